"""Command lines of the scripts: flags made from the config dataclasses, so that a setting is written down once, and a
TOML file that holds the same settings.
"""

import argparse
import dataclasses
import math
import os
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from llm_common.command_line import CommandParser
from llm_common.config import (
    ATTENTION_BACKENDS,
    COMPILE,
    DTYPES,
    REMAT,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainConfig,
)
from llm_common.errors import UserError, nearest, read_small
from llm_common.processes import end_with_launcher
from llm_common.run.backend import Backend
from llm_common.run.estimates import GIB, memory_per_step
from llm_common.run.host_memory import keep_freed_memory
from llm_common.run.hosts import Hosts
from llm_common.run.launch import launch
from llm_common.sharding import MeshConfig
from llm_common.text.corpus import Corpus

LARGEST_TOML = 1 << 20  # bytes
CHOICES = {"attention_backend": ATTENTION_BACKENDS, "compile": COMPILE, "compute_dtype": DTYPES, "remat": REMAT}
TABLES = ("model", "data", "machine", "optimizer", "training", "execution", "run", "checkpoints", "sampling")


def make_parser(program: str, doc: str | None) -> CommandParser:
    """The parser of a program of `one-model`, or of a script of the repository (its name then ends in .py)."""
    prog = program if program.endswith(".py") else f"one-model {program}"
    return CommandParser(
        prog=prog, usage=f"{prog} [flags]", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One `--field-name` for every field of a dataclass, with its default."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        flag, text = "--" + field.name.replace("_", "-"), f"default: {'none' if default is None else default}"
        choices = CHOICES.get(field.name)
        if choices is not None:
            text = f"one of {', '.join(choices)} ({text})"
        if hints[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        group.add_argument(
            flag,
            type=_parser_of(hints[field.name]),
            choices=choices,
            default=default,
            metavar=getattr(hints[field.name], "__name__", "number or 'none'").upper(),
            help=text,
        )


def from_flags(cls: type, args: argparse.Namespace) -> Any:
    """The dataclass from parsed flags; its own validation names a wrong field and value."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def recipe_from_flags(args: argparse.Namespace, model: ModelConfig, optimizer: OptimizerConfig | None = None) -> Recipe:
    """A recipe of the flags of TrainConfig and ExecutionConfig."""
    train, execution = from_flags(TrainConfig, args), from_flags(ExecutionConfig, args)
    return Recipe(model, train, optimizer or OptimizerConfig(), execution)


def parse_with_toml(parser: argparse.ArgumentParser, argv: typing.Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, over the settings of the TOML file given as `--config`, over the defaults.

    The file's keys are the flags' names with underscores, at the top or in tables, whose names are for people: those of
    `TABLES`. Raises UserError for a file that is not TOML, a table or a key that is not known, and a value of the wrong
    kind.
    """
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings in a file; flags given besides go first")
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args(argv)
    if given.config is not None:
        parser.set_defaults(**_read_toml(parser, given.config))
    return parser.parse_args(argv)


def _read_toml(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config {path}: {'a folder; a file is needed' if path.is_dir() else 'no such file'}")
    if path.suffix == ".json":
        raise UserError(f"--config {path}: a TOML file is expected; a model's config.json goes to --model-config")
    try:
        content = tomllib.loads(read_small(path, most=LARGEST_TOML).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise UserError(f"{path}: not TOML ({reason})") from None
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values: dict[str, Any] = {}
    tables = [key for key, value in content.items() if isinstance(value, dict)]
    for table in tables:
        if table not in TABLES:
            raise UserError(f"{path}: unknown table [{table}]{nearest(table, TABLES)}; known: {', '.join(TABLES)}")
    for key, value in content.items():
        for name, x in value.items() if isinstance(value, dict) else [(key, value)]:
            if name in values:
                raise UserError(f"{path}: key {name!r} is there twice")
            if name not in actions:
                near = nearest(name, actions)
                known = "" if near else f"; known keys: {', '.join(sorted(actions))}"
                raise UserError(f"{path}: unknown key {name!r}{near}{known}")
            values[name] = _toml_value(path, actions[name], x)
    return values


def _toml_value(path: Path, action: argparse.Action, value: Any) -> Any:
    """A value from TOML as the flag would give it; text goes through the flag's own parser."""
    wrong = UserError(f"{path}: {action.dest} = {value!r} is not what --{action.dest.replace('_', '-')} takes")
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) for x in items):
            raise wrong
        return [action.type(x) if callable(action.type) else x for x in items]
    if value == "":
        raise UserError(f"{path}: {action.dest} is empty: give a value, or leave the key out")
    several = "several" in getattr(action.type, "__name__", "")
    whole = isinstance(value, list) and value and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    if whole and several:
        value = ",".join(map(str, value))
        try:
            return action.type(value) if callable(action.type) else value
        except (ValueError, TypeError):
            raise wrong from None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    try:
        parsed = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, TypeError):
        raise wrong from None
    if action.choices is not None and parsed not in action.choices:
        raise UserError(f"{path}: {action.dest} = {value!r}; known: {', '.join(map(str, action.choices))}")
    if isinstance(value, str) and isinstance(parsed, int | float) and not math.isnan(parsed):
        raise wrong  # a number in quotation marks
    return parsed


def require(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError unless these flags were given, on the command line or in the file."""
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing")


def prepare_environment(cache_dir: Path | None) -> None:
    """What must be set before a framework is imported: compilation caches, what a GPU gives JAX, how torch picks its
    kernels.
    """
    if cache_dir is not None:
        place = next((x for x in (cache_dir, *cache_dir.parents) if x.exists()), cache_dir)
        if not place.is_dir():
            raise UserError(f"--cache-dir {cache_dir}: {place} is a file; a folder is needed")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir / "jax"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "torch"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic matrix products ask for
    # torch.compile's search times kernels by the median of runs with a cache flushed five times over; its own way, the
    # best of a hundred runs behind a flush of the cache's size, picks kernels for the run that found their weights
    # still in the cache
    os.environ.setdefault("TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER", "0")


def keep_memory_of_a_small_step(device: str, recipe: Recipe) -> None:
    """`keep_freed_memory` where it pays. To be called before a framework starts its threads, so before one can be asked
    for devices.
    """
    alone = device == "auto" and not has_accelerator()
    if (device == "cpu" or alone) and sum(memory_per_step(recipe, False, False).values()) < GIB / 2:
        keep_freed_memory()


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a flag below 1; one that was left out is None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")


MOST_PROCESSES = 512


def check_processes(processes: int | None) -> None:
    """Raise UserError for more processes than any machine has cores."""
    if processes is not None and processes > MOST_PROCESSES:
        raise UserError(f"--processes {processes}: at most {MOST_PROCESSES}; this machine has {cores()} cores")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_text_flags(parser: Any) -> None:
    """How files become texts."""
    parser.add_argument(
        "--field", default="text", help="the field of JSONL, JSON or CSV that has the text (default: text)"
    )
    parser.add_argument("--replace-invalid", action="store_true", help="bytes that are not UTF-8 become U+FFFD")
    parser.add_argument("--as-text", action="store_true", help="files are text, whatever their names and contents say")


def add_special_flag(parser: Any, **options: Any) -> None:
    """What special tokens written out in a text are."""
    parser.add_argument(
        "--special-tokens-in-text",
        action=argparse.BooleanOptionalAction,
        help="whether special tokens that a text has written out are those tokens, or text like any other",
        **options,
    )


def add_corpus_flags(parser: argparse.ArgumentParser, processes_do: str) -> None:
    """How text is read, beside the flag that names the files; processes_do: what --processes are for."""
    add_text_flags(parser)
    parser.add_argument("--processes", type=int, help=f"that {processes_do} (default: as many as there are cores)")


def open_corpus(
    paths: list[Path], args: argparse.Namespace, show: typing.Callable[[str, int, int], None], what: str
) -> Corpus:
    """The corpus of some files, read as the flags say; `show(what, bytes read, all bytes)` is called as it is read."""
    read = 0

    def on_bytes(n: int) -> None:
        nonlocal read
        read += n
        show(what, read, corpus.size)

    corpus = Corpus(paths, args.field, args.replace_invalid, on_bytes, args.as_text)
    return corpus


def add_mesh_flags(parser: Any) -> None:
    """`--mesh` and `--join-timeout`, for a parser or a group of it."""
    parser.add_argument("--mesh", help="many devices, as data=2,fsdp=4,tensor=2: replicas, cut weights, cut matrices")
    parser.add_argument("--join-timeout", type=seconds, default=300, help="seconds to wait for the other processes")


def seconds(text: str) -> float:
    """A flag's number of seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


seconds.__name__ = "a positive number"


DEVICES = ("auto", "cpu", "gpu", "tpu")
ACCELERATORS = ("nvidia[0-9]*", "accel*", "vfio", "kfd", "dxg")  # what drivers put into /dev


def has_accelerator() -> bool:
    """Whether a driver shows a device in /dev."""
    return any(any(Path("/dev").glob(name)) for name in ACCELERATORS)


def check_device(device: str) -> None:
    """Raise UserError, before a framework is imported, for a device that no machine has, or that this one lacks."""
    if device not in DEVICES:
        raise UserError(f"--device {device}{nearest(device, DEVICES)}; known: {', '.join(DEVICES)}")
    if device in ("gpu", "tpu") and Path("/dev").is_dir() and not has_accelerator():
        raise UserError(f"--device {device}: this machine has none that a driver shows in /dev; take --device cpu")


def join(backend: Backend, args: argparse.Namespace, mesh: MeshConfig | None) -> Hosts:
    """The processes of this program: this one alone, or those that the environment knows of."""
    started = 1
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "JAX_NUM_PROCESSES", "NNODES"):
        text = os.environ.get(name, "1")
        if not text.isdigit() or text == "0":
            raise UserError(f"{name}={text}: must be a whole number of at least 1")
        started = max(started, int(text) if name != "NNODES" or mesh is None else 1)
    if mesh is None:
        if started > 1:
            raise UserError(f"{started} processes were started: say how they share the work, as --mesh data={started}")
        hosts = Hosts()
        hosts.device = args.device
        return hosts
    if backend.name == "torch" and mesh.size > 1 and started == 1 and "RANK" not in os.environ:
        # torch has a process for each device; all that a person can get wrong was looked at before
        sys.exit(launch(mesh.size))
    end_with_launcher()
    return backend.join_hosts(args.device, args.join_timeout)


def only_the_first_prints(hosts: Hosts) -> None:
    """Let a host that is not the first print nothing from here on; errors are said on all."""
    if hosts.index > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _parser_of(hint: Any) -> typing.Callable[[str], Any]:
    if isinstance(hint, types.UnionType):  # float | None, int | tuple[int, ...] | None
        inner, *several = (x for x in typing.get_args(hint) if x is not types.NoneType)

        def parse(text: str) -> Any:
            if text.lower() == "none":
                return None
            return tuple(inner(part) for part in text.split(",")) if several and "," in text else inner(text)

        parse.__name__ = f"{inner.__name__}{', several with commas between,' if several else ''} or none"
        return parse
    return hint
