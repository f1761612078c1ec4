"""Kills and corruptions in great numbers: is anything lost that was saved, is any change of a file read as if it were right?

    python scripts/soak.py kills --count 10000
    python scripts/soak.py corruptions --count 20000
    python scripts/soak.py kills --kind run --count 500 --seed 7

kills: a process trains (a model of numbers, no framework), saves, exports, prepares or converts, and is killed at a random moment; then
what was there before must be whole, what is there now must be whole or be seen not to be, and no process may be left. corruptions: a
byte, a piece or a file of something saved is changed; reading it must be refused by name, or give what was saved.

Prints a row for each kind. The exit code is 0 if nothing was lost, nothing wrong was read, and nothing raised but a clear error.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flags import at_least_one, make_parser
from rich.console import Console
from rich.table import Table

from llm_common.checkpoint import (
    TrainingState,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from llm_common.config import OptimizerConfig, RunConfig, TrainConfig, preset
from llm_common.data import check_data, open_tokens, write_tokens
from llm_common.errors import UserError, run_main
from llm_common.evaluation import Evaluation
from llm_common.examples import load_examples, write_examples
from llm_common.export import export
from llm_common.hf_tokenizer import load_tokenizer
from llm_common.run import Run
from llm_common.run_log import read_log
from llm_common.shards import prepare
from llm_common.tensors import tensor_shapes
from llm_common.tokenizer import Tokenizer

CFG, TOKENIZER = preset("tiny"), Tokenizer([])
SMALL = {name: shape for name, shape in tensor_shapes(CFG).items()}  # noqa: C416
SPAN = {"run": 0.08, "save": 0.04, "export": 0.03, "tokens": 0.01, "examples": 0.01, "shards": 2.5, "dcp": 0.08}
RARE = {"shards": 50}  # kinds whose start takes long: one in so many kills


def state_of(step: int) -> TrainingState:
    """A training state in which every number is the step's."""
    tensors = lambda: {name: np.full(shape, step, np.float32) for name, shape in SMALL.items()}
    return TrainingState(tensors(), tensors(), tensors(), step, step)


class Numbers:
    """A dataset that nobody reads."""

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("the soak's model of numbers has no batches")

    def fingerprint(self) -> dict[str, Any]:
        return {"tokens": 1}


@dataclass
class Kind:
    """Something that is killed. work(folder) goes on until then; check(folder) raises AssertionError for what is lost or wrong."""

    work: Callable[[Path], None]
    check: Callable[[Path], None]


# --- what is killed, and what must hold after it


def work_run(folder: Path) -> None:
    """Train from the newest checkpoint on, saving every second step; evaluate, prune and log as a run does."""
    evaluation = Evaluation(np.arange(9), 4, 2)
    config = RunConfig(save_every=2, keep_last=2, keep_best=1)
    run = Run(folder / "run", CFG, TrainConfig(), OptimizerConfig(total_steps=10**6), Numbers(), "jax", evaluation=evaluation, config=config)  # fmt: skip
    with run:
        saved = run.resume()
        step = 0 if saved is None else saved.step
        while True:
            step += 1
            metrics = {"loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "skipped": False}
            run.after_step(
                step, metrics, lambda step=step: state_of(step), lambda _, step=step: (8.0 * abs(step - 20), 8)
            )


def check_run(folder: Path) -> None:
    found = checkpoints(folder / "run")
    for path in found:
        check_state(path)
    before = folder / "newest"
    newest = int(found[-1].name[5:]) if found else 0
    assert newest >= int(before.read_text() if before.is_file() else 0), "a checkpoint that was there is gone"
    before.write_text(str(newest))
    log = folder / "run" / "log.jsonl"
    steps = [row["step"] for row in read_log(log) if "event" not in row] if log.is_file() else []
    assert steps == list(range(1, len(steps) + 1)), "the log has not every step once"
    assert len(steps) >= newest, "the log lacks steps that are saved"


def check_state(path: Path) -> None:
    _, state, _ = load_checkpoint(path, CFG)
    for part in (state.weights, state.mu, state.nu):
        assert all((x == state.step).all() for x in part.values()), f"{path}: not what was saved"


def work_save(folder: Path) -> None:
    """Save, and save the same step again, and prune."""
    last = latest_checkpoint(folder / "run")
    step = 0 if last is None else int(last.name[5:])
    while True:
        step += 1
        save_checkpoint(folder / "run", CFG, state_of(step), {}, TOKENIZER)
        save_checkpoint(folder / "run", CFG, state_of(step), {"again": True}, TOKENIZER)
        prune_checkpoints(folder / "run", 2, 0)


def check_save(folder: Path) -> None:
    found = checkpoints(folder / "run")
    for path in found:
        check_state(path)
    newest, before = int(found[-1].name[5:]) if found else 0, folder / "newest"
    assert newest >= int(before.read_text() if before.is_file() else 0), "a checkpoint that was there is gone"
    before.write_text(str(newest))


def work_export(folder: Path) -> None:
    number = max((int(path.name[6:]) for path in folder.glob("model-*")), default=0)
    while True:
        number += 1
        export(folder / f"model-{number}", CFG, state_of(number).weights, TOKENIZER, shard_bytes=40_000)
        if number > 3 and (folder / f"model-{number - 3}").exists():
            (folder / f"model-{number - 3}").rename(folder / f"old-{number - 3}")
            shutil.rmtree(folder / f"old-{number - 3}")


def check_export(folder: Path) -> None:
    for path in folder.glob("model-*"):
        _, weights = load_weights(path)
        assert all((x == int(path.name[6:])).all() for x in weights.values()), f"{path}: not what was exported"


def work_tokens(folder: Path) -> None:
    while True:
        for text in ("a" * 50, "b" * 900):
            write_tokens(folder / "t.npy", [text] * 20, TOKENIZER)


def check_tokens(folder: Path) -> None:
    if not (folder / "t.npy").is_file() and not (folder / "was").exists():
        return
    (folder / "was").write_text("")  # from now on a whole one must be there
    description = check_data(folder / "t.npy", TOKENIZER)
    assert len(open_tokens(folder / "t.npy")) == description["tokens"], "not what its description says"


def work_examples(folder: Path) -> None:
    while True:
        for n in (3, 400):
            write_examples(folder / "e.npz", [([1, 2], [3] * n)] * n, TOKENIZER)


def check_examples(folder: Path) -> None:
    if not (folder / "e.npz").is_file() and not (folder / "was").exists():
        return
    (folder / "was").write_text("")
    description = check_data(folder / "e.npz", TOKENIZER)
    assert len(load_examples(folder / "e.npz")[2]) == description["examples"], "not what its description says"


DOCUMENTS = [f"document {i} " * (i % 40 + 1) for i in range(400)]


def work_shards(folder: Path) -> None:
    """Prepare one folder of shards after the other; one that was begun goes on."""
    TOKENIZER.save(folder / "bpe.json")
    number = max((int(path.name[5:]) for path in folder.glob("data-*")), default=1)
    while True:
        if not (folder / f"data-{number}" / "validation" / "manifest.json").is_file():
            prepare(DOCUMENTS, folder / f"data-{number}", folder / "bpe.json", 0.1, 2, part_size=3000)
        number += 1


def check_shards(folder: Path) -> None:
    for data in folder.glob("data-*"):
        if (data / "train" / "manifest.json").is_file():
            assert check_data(data / "train")["documents"] > len(DOCUMENTS) / 2, "not what was prepared"
            continue
        try:
            open_tokens(data)
        except UserError:
            continue
        raise AssertionError("data without a manifest was read")


def work_dcp(folder: Path) -> None:
    """Convert to torch's format and back, as scripts/convert_checkpoint.py does."""
    import torch

    from torch_llm import foreign_checkpoint

    torch.set_num_threads(1)
    saved = save_checkpoint(folder / "run", CFG, state_of(1), {}, TOKENIZER)
    _, state, _ = load_checkpoint(saved)
    tree = {f"weights.{name}": np.array(x) for name, x in state.weights.items()}
    while True:
        partial = folder / ".dcp.partial"
        shutil.rmtree(partial, ignore_errors=True)
        foreign_checkpoint.write(partial, tree)
        if (folder / "dcp").exists():
            found = foreign_checkpoint.read(folder / "dcp", tree)
            save_checkpoint(
                folder / "again", CFG, TrainingState({k[8:]: x for k, x in found.items()}, *state_moments(), 1, 1), {}
            )
        else:
            partial.rename(folder / "dcp")


def state_moments() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    state = state_of(1)
    return dict(state.mu), dict(state.nu)


def check_dcp(folder: Path) -> None:
    for name in ("run", "again"):
        for path in checkpoints(folder / name):
            check_state(path)


KINDS = {
    "run": Kind(work_run, check_run),
    "save": Kind(work_save, check_save),
    "export": Kind(work_export, check_export),
    "tokens": Kind(work_tokens, check_tokens),
    "examples": Kind(work_examples, check_examples),
    "shards": Kind(work_shards, check_shards),
    "dcp": Kind(work_dcp, check_dcp),
}


def kill_once(name: str, folder: Path, rng: random.Random) -> str | None:
    """Let a kind work in a process, kill it at a random moment, and look; returns what is wrong, or None."""
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            kind.work(folder)
        except BaseException:
            (folder / "raised").write_text(traceback.format_exc())
        os._exit(1)
    time.sleep(SPAN[name] * rng.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return f"ended by itself: {(folder / 'raised').read_text().strip().splitlines()[-1]}"
    until = time.monotonic() + 20
    while (left := processes_of(child)) and time.monotonic() < until:
        time.sleep(0.02)
    if left:
        return f"processes are left: {left}"
    try:
        kind.check(folder)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def processes_of(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kills(names: list[str], count: int, seed: int, progress: Callable[[int], None]) -> tuple[Counter, list[str]]:
    """Kill so many times; how often each kind was, and what was wrong."""
    rng, done, wrong = random.Random(seed), Counter(), []
    often = [name for name in names if name not in RARE] or names
    with tempfile.TemporaryDirectory() as place:
        for i in range(count):
            name = rng.choice(often)
            rare = [x for x in names if x in RARE and i % RARE[x] == RARE[x] - 1]
            name = rare[0] if rare else name
            folder = Path(place) / f"{name}-{done[name] // 40}"  # begun anew now and then
            problem = kill_once(name, folder, rng)
            done[name] += 1
            if problem is not None:
                wrong.append(f"{name}, kill {i}: {problem}")
                shutil.rmtree(folder, ignore_errors=True)
            progress(i + 1)
    return done, wrong


# --- corruptions


def corrupt(path: Path, rng: random.Random) -> str:
    """Change a file in some way; returns what was done."""
    content = bytearray(path.read_bytes())
    ways = ["flip", "flip", "flip", "zeros", "swap", "cut", "append", "delete", "insert"]
    way, at = rng.choice(ways), rng.randrange(max(1, len(content)))
    if way == "delete" or not content:
        path.unlink()
        return f"{path.name}: deleted"
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif way == "swap":
        other = rng.randrange(len(content))
        content[at], content[other] = content[other], content[at]
    elif way == "cut":
        del content[at:]
    elif way == "append":
        content += bytes([rng.randrange(256)])
    else:
        content.insert(at, rng.randrange(256))
    path.write_bytes(content)
    return f"{path.name}: {way} at {at}"


def read_checkpoint(folder: Path) -> Any:
    cfg, state, settings = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    parts = [{name: x.tobytes() for name, x in part.items()} for part in (state.weights, state.mu, state.nu)]
    return cfg, parts, state.step, state.adam_count, settings, None if tokenizer is None else tokenizer.fingerprint()


def read_model(folder: Path) -> Any:
    cfg, weights = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    return (
        cfg,
        {name: x.tobytes() for name, x in weights.items()},
        None if tokenizer is None else tokenizer.encode("ab c"),
    )


def read_data(folder: Path) -> Any:
    description, tokens = check_data(folder / "t.npy", TOKENIZER), open_tokens(folder / "t.npy")
    return description, np.array(tokens[: len(tokens)]).tobytes()


def read_questions(folder: Path) -> Any:
    return check_data(folder / "e.npz", TOKENIZER), [x.tobytes() for x in load_examples(folder / "e.npz")]


def read_shards(folder: Path) -> Any:
    description, tokens = check_data(folder, TOKENIZER), open_tokens(folder)
    return description, np.array(tokens[: len(tokens)]).tobytes()


def make_all(place: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """One of everything that is saved, and how it is read."""
    rng = np.random.default_rng(0)
    random_state = state_of(7)
    for part in (random_state.weights, random_state.mu, random_state.nu):
        for name, x in part.items():
            x[...] = rng.standard_normal(SMALL[name])
    saved = save_checkpoint(place / "run", CFG, random_state, {"evaluation": {"loss": 2.5}, "seed": 1}, TOKENIZER)
    export(place / "model", CFG, random_state.weights, TOKENIZER, shard_bytes=60_000)
    (place / "tokens").mkdir()
    write_tokens(place / "tokens" / "t.npy", DOCUMENTS, TOKENIZER)
    (place / "examples").mkdir()
    write_examples(place / "examples" / "e.npz", [([1, 2, i % 9], [3, 4]) for i in range(50)], TOKENIZER)
    TOKENIZER.save(place / "bpe.json")
    prepare(DOCUMENTS, place / "data", place / "bpe.json", processes=1, part_size=9000)
    return {
        "checkpoint": (saved, read_checkpoint),
        "tokens": (place / "tokens", read_data),
        "examples": (place / "examples", read_questions),
        "shards": (place / "data" / "train", read_shards),
        "hugging face": (place / "model", read_model),
    }


def corruptions(count: int, seed: int, progress: Callable[[int], None]) -> tuple[dict[str, Counter], list[str]]:
    """Corrupt so many times; what came of it for each kind, and what was wrong. A Hugging Face folder has no checksums: there a
    change that is no error of form cannot be seen.
    """
    rng, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        everything = make_all(place)
        expected = {name: read(folder) for name, (folder, read) in everything.items()}
        outcomes = {name: Counter() for name in everything}
        for i in range(count):
            name = rng.choice(list(everything))
            folder, read = everything[name]
            copy = place / "copy" / folder.name
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(folder, copy)
            what = corrupt(rng.choice(sorted(path for path in copy.rglob("*") if path.is_file())), rng)
            try:
                found = read(copy)
                outcome = (
                    "as saved" if found == expected[name] else "not to be seen" if name == "hugging face" else "WRONG"
                )
            except UserError as error:
                outcome = "refused" if "\n" not in str(error) else "NOT ONE LINE"
            except Exception as error:
                outcome, what = "RAISED", f"{what}: {type(error).__name__}: {error}"
            outcomes[name][outcome] += 1
            if outcome.isupper():
                wrong.append(f"{name}, {what}: {outcome}")
            progress(i + 1)
    return outcomes, wrong


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["kills", "corruptions"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="of kills; may be repeated (default: all)")
    args = parser.parse_args()
    at_least_one(args, "count")
    console, start, said = Console(), time.monotonic(), 0.0

    def progress(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            console.print(f"{done:,} of {args.count:,}, {said - start:.0f} s")

    table = Table("kind", "times", title=f"{args.count:,} {args.what}, seed {args.seed}", title_justify="left")
    if args.what == "kills":
        done, wrong = kills(args.kind or list(KINDS), args.count, args.seed, progress)
        for name, times in sorted(done.items()):
            table.add_row(name, f"{times:,}")
    else:
        outcomes, wrong = corruptions(args.count, args.seed, progress)
        table.add_column("outcome")
        for name, counts in outcomes.items():
            table.add_row(
                name, f"{counts.total():,}", json.dumps(dict(counts.most_common())).strip("{}").replace('"', "")
            )
    console.print(table)
    for line in wrong[:20]:
        console.print(line, markup=False, highlight=False)
    console.print(f"{len(wrong)} wrong, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
