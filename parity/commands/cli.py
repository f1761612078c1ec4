"""The command line of the parity suite. `parity` alone is `parity run`.

parity                                            the ladder on the tiny preset
parity run --check gradients --dtype float64 --seed 7
parity run --model-config path/to/config.json --length 33
parity trace                                      every module given identical inputs: where do the sides part?
parity mutants                                    planted bugs: is each caught, on the right side, at the right place?
parity judge ref.py:make port.py:make --inputs x.npz   is the candidate the same program as the reference?
parity pair examples/mlp.py                       a pair that is not ours
parity report                                     one HTML page of all that was run; what was not is run first
parity calibrate --seeds 4                        how far every tolerance is from correct code
parity demo --data my_texts/                      train a small model in both frameworks, then the ladder
"""

import argparse
import dataclasses
import json
import math
import os
import runpy
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm_common.command_line import CommandParser
from llm_common.config import DTYPES, PRESETS, ModelConfig, preset
from llm_common.errors import UserError, counted, first_line, nearest, require_framework, run_main
from llm_common.run.host_memory import keep_freed_memory
from llm_common.run.progress import Heartbeat
from parity.commands.judge import add_flags as judge_flags
from parity.commands.judge import run_judge
from parity.commands.mutants import add_flags, run_mutants

OUT = Path("runs/parity")
# The checks of the ladder, in its order, before anything of it is imported; a test compares them with it.
CHECK_NAMES = (
    "spec", "config", "random", "tokenizer", "data", "bookkeeping", "init", "logits", "gradients", "precision",
    "kernels", "noise", "schedule", "adamw", "library", "files", "resume", "calls", "runs", "trajectory",
    "evaluation", "cache", "programs", "tokens", "device",
)  # fmt: skip

# How long, on two cores: told beforehand, for what takes minutes looks like what hangs.
TAKES = {
    "run": "3 to 7 minutes",
    "run --quick": "1 to 2 minutes",
    "trace": "half a minute",
    "mutants": "6 to 20 minutes",
    "demo": "3 to 7 minutes",
    "sharded": "3 to 8 minutes",
    "sharded --quick": "1 to 2 minutes",
}
PARTS = ("check", "case", "fuzz", "words", "name", "list", "generated", "gates", "pytest", "bugs")  # flags


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="parity", description="Prove that the JAX and the PyTorch side agree, or name the side that differs."
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="the ladder of checks (default)")
    _model_flags(run)
    run.add_argument("--check", action="append", help="one check alone; may be repeated (unknown names list the known)")
    run.add_argument("--dtype", action="append", choices=DTYPES, help="one dtype alone; may be repeated")
    run.add_argument("--steps", type=int, default=1000, help="steps of a trajectory")
    run.add_argument("--tokens", type=int, default=4000, help="sampled tokens in float32")
    run.add_argument("--compile", action="store_true", help="torch.compile as one more noise control (half a minute)")
    run.add_argument("--jobs", type=int, help="processes (default: 2 on a CPU with 2 cores or more)")
    run.add_argument("--quick", action="store_true", help="the minute's part: no trajectory, fewer cases and seeds")
    run.add_argument("--full", action="store_true", help="every value of every setting in the cases that cover pairs")
    run.add_argument("--fuzz", metavar="TIME", help="draw cases until a time as 30m is over, or one fails")
    run.add_argument("--case", metavar="LINE", help="one case again, as --fuzz and the ladder print it")
    trace = commands.add_parser("trace", help="every module of both sides given identical inputs and gradients")
    _model_flags(trace)
    trace.add_argument("--dtype", default="float64", choices=DTYPES)
    add_flags(commands.add_parser("mutants", help="plant bugs and see that each is caught"), OUT)
    judged = commands.add_parser("judge", help="is a candidate the same program as a reference, in any framework?")
    judge_flags(judged)
    pair = commands.add_parser("pair", help="compare a pair of your own: a script that makes a parity.pair.Pair")
    pair.add_argument("script", type=Path, help="Python file; every Pair among its names is compared")
    pair.add_argument("--dtype", action="append", choices=("float64", "float32"), help="float64 and float32 by default")
    pair.add_argument("--out", type=Path, default=Path("runs/pair"))
    report = commands.add_parser("report", help="one HTML page of all that was run")
    report.add_argument("--out", type=Path, default=OUT, help="the folder that `run`, `trace` and `mutants` wrote to")
    sharded = commands.add_parser("sharded", help="training on many devices against the specification, on this CPU")
    sharded.add_argument("--quick", action="store_true", help="a few of the meshes")
    sharded.add_argument("--seed", type=int, default=0, help="of the case that is drawn for each framework")
    sharded.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="gpu: the meshes of two GPUs")
    sharded.add_argument("--bugs", action="store_true", help="plant the sharding bugs and see that each is caught")
    sharded.add_argument("--out", type=Path, default=Path("runs/sharded"))
    calibrate = commands.add_parser("calibrate", help="the ladder over seeds and shapes: the margin of every tolerance")
    calibrate.add_argument("--seeds", type=int, default=4, help="seeds for each shape")
    calibrate.add_argument("--first-seed", type=int, default=1000)
    calibrate.add_argument("--steps", type=int, default=1000, help="steps of a trajectory")
    calibrate.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    calibrate.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    calibrate.add_argument(
        "--merge", type=Path, action="append", default=[], help="figures.json of another calibration"
    )
    calibrate.add_argument("--out", type=Path, default=Path("runs/calibration"))
    demo = commands.add_parser("demo", help="train a small model in both frameworks, then the ladder")
    demo.add_argument("--data", help="a UTF-8 file or a folder of .txt and .md files (default: Python's documentation)")
    demo.add_argument("--steps", type=int, default=200, help="training steps of each framework")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)} (default: tiny)")
    model.add_argument("--model-config", type=Path, help="a config.json with Hugging Face keys instead of a preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=3, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=13, help="positions in a sequence")
    parser.add_argument("--device", default="cpu", help="cpu, gpu or tpu, for both frameworks (default: cpu)")
    parser.add_argument(
        "--attention", default="reference", choices=["reference", "auto"], help="auto: what a run takes by itself"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of report.json, report.md and report.html")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = _parser().parse_args(argv)
    for name in getattr(args, "check", None) or ():
        if name not in CHECK_NAMES:
            raise UserError(
                f"--check {name}: no such check{nearest(name, CHECK_NAMES)}; known: {', '.join(CHECK_NAMES)}"
            )
    for framework in ("jax", "torch"):
        require_framework(framework)
    commands = {
        "run": _run,
        "trace": _trace,
        "mutants": run_mutants,
        "judge": run_judge,
        "pair": _pair,
        "report": _report,
        "sharded": _sharded,
        "calibrate": _calibrate,
        "demo": _demo,
    }
    if (words := _takes(args)) is not None:
        print(words, flush=True)
    # what has no bar of its own, or shows none to a pipe, says now and then that it is at work
    barless = args.command in ("trace", "judge", "pair", "sharded", "calibrate") or not sys.stderr.isatty()
    with Heartbeat(f"parity {args.command}", quiet=not barless or args.command in ("run", "report")):
        result = commands[args.command](args)
        return (0 if result else 1) if isinstance(result, bool) else result


def _takes(args: argparse.Namespace) -> str | None:
    """How long a command takes, or None of a part of one, or of another machine."""
    whole = args.command + (" --quick" if getattr(args, "quick", False) else "")
    part = any(getattr(args, name, None) for name in PARTS) or getattr(args, "device", "cpu") != "cpu"
    return None if part or whole not in TAKES else f"parity {whole}: {TAKES[whole]} on two cores"


def _settings(args: argparse.Namespace, **more):
    from parity.sides.settings import Settings

    cfg = ModelConfig.from_file(args.model_config) if args.model_config else preset(args.preset)
    shape = {"seed": args.seed, "batch": args.batch, "length": args.length}
    return Settings(cfg=cfg, device=args.device, attention=args.attention, **shape, **more)


def _run(args: argparse.Namespace) -> bool:
    from parity.checks.ladder import CHECKS, SLOW, run_checks, run_with_figures
    from parity.report.report import make_console, print_and_write, print_progress
    from parity.sides.settings import Settings

    dtypes = tuple(args.dtype) if args.dtype else Settings().dtypes
    size = {"steps": args.steps, "tokens": args.tokens}
    if args.quick:
        size = {"steps": min(args.steps, 100), "tokens": min(args.tokens, 800), "seeds": 8, "updates": (1, 3, 10)}
    settings = _settings(args, dtypes=dtypes, compile=args.compile, quick=args.quick, full=args.full, **size)
    if args.fuzz is not None or args.case is not None:
        return _drawn(args, settings)
    console, start, name = make_console(), time.perf_counter(), settings.device_name()
    console.print(
        f"identical weights into JAX, PyTorch and the specification; seed {settings.seed}, {name}, "
        f"{settings.attention} attention, {settings.cfg}"
    )
    jobs = args.jobs or (min(2, os.cpu_count() or 1) if args.device == "cpu" else 1)
    drawn: dict = {}
    heart = Heartbeat("the first checks")

    def tell(name: str, rows: list, seconds: float) -> None:
        print_progress(console, name, rows, seconds)
        heart.says(f"the checks after {name}")

    if args.quick and not args.check:
        args.check = [name for name in CHECKS if name not in SLOW]
    with heart:
        if args.check:
            rows = run_checks(settings, tuple(args.check), tell, jobs)
        else:
            rows, drawn = run_with_figures(settings, tell, jobs)
    if not rows:
        raise UserError("nothing was checked: the chosen check has no part in the chosen dtype")
    paragraphs = [f"Seed {settings.seed}, {settings.attention} attention, `{settings.cfg}`."]
    content = {"seconds": time.perf_counter() - start, "settings": dataclasses.asdict(settings)}
    return print_and_write(console, args.out, rows, paragraphs, name, **content, figures=drawn)


def _drawn(args: argparse.Namespace, settings) -> bool:
    from parity.checks.fuzz import Drawn, fuzz, judge_and_explain, seconds_of
    from parity.report.report import make_console, print_table

    console, start = make_console(), time.perf_counter()
    if args.case is not None:
        row = judge_and_explain(settings, Drawn.parse(args.case))
        print_table(console, [row])
        return row.ok
    seconds, jobs = seconds_of(args.fuzz), args.jobs or min(2, os.cpu_count() or 1)
    console.print(f"drawing cases with seed {settings.seed} for {seconds:.0f} s; past finds first, if any")

    shares: dict[str, float] = {}

    def tell(done: int, one, row) -> None:
        share = row.measured / row.allowed if row.allowed else row.measured
        shares[one.kind] = max(shares.get(one.kind, 0.0), share)
        if done % 20 == 0 or not row.ok:
            console.print(f"  {counted(done, 'case')} ({time.perf_counter() - start:.0f} s)")

    done, found, row = fuzz(settings, seconds, jobs, tell)
    largest = ", ".join(f"{kind} {share:.2g}" for kind, share in sorted(shares.items()))
    console.print(f"largest figure by kind, in units of what is allowed: {largest}")
    if found is None or row is None:
        console.print(f"{counted(done, 'drawn case')}, no difference; seed {settings.seed}")
        return True
    print_table(console, [row])
    console.print(f"after {counted(done, 'case')}; again: parity run --case '{found}'", markup=False, soft_wrap=True)
    return False


def _trace(args: argparse.Namespace) -> bool:
    from parity.report.report import make_console, print_trace, write_trace
    from parity.trace.trace import trace

    found, console = trace(_settings(args), dtype=args.dtype), make_console()
    print_trace(console, found)
    write_trace(args.out / "trace.json", found)
    return found.faults() == (None, None)


def _pair(args: argparse.Namespace) -> bool:
    from parity.pair import Pair

    if not args.script.is_file():
        raise UserError(f"{args.script}: no such script; it is a Python file that makes a parity.pair.Pair")
    if args.script.suffix != ".py":
        raise UserError(
            f"{args.script}: not a Python file, which is what makes a parity.pair.Pair; see examples/mlp.py"
        )
    try:
        names = runpy.run_path(str(args.script))
    except UserError:
        raise
    except Exception as error:  # whatever a script raises; its own line is where to look
        raise UserError(f"{_place_in(args.script, error)}: {type(error).__name__}: {first_line(error)}") from None
    pairs = {name: value for name, value in names.items() if isinstance(value, Pair)}
    if not pairs:
        raise UserError(f"{args.script}: makes no parity.pair.Pair; see examples/mlp.py")
    ok = True
    for name, pair in pairs.items():
        comparison = pair.compare(args.dtype).show()
        comparison.write(args.out if len(pairs) == 1 else args.out / name)
        ok &= comparison.ok
    return ok


def _place_in(script: Path, error: Exception) -> str:
    """The script and the line of it that an exception came from."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{script}, line {error.lineno}"
    frames = [x for x in traceback.extract_tb(error.__traceback__) if Path(x.filename).name == script.name]
    return f"{script}, line {frames[-1].lineno}" if frames else str(script)


def _report(args: argparse.Namespace) -> bool:
    from parity.report.report import make_console, write_html_of

    console, out = make_console(), ["--out", str(args.out)]
    files = {"run": "report.json", "trace": "trace.json", "mutants": "mutants.json"}
    missing = [command for command, file in files.items() if not (args.out / file).is_file()]
    if missing:
        names = ", ".join(f"parity {command} ({TAKES[command]})" for command in missing)
        console.print(f"run first, on two cores: {names}; Ctrl-C ends, and what was done by then is kept")
    for command in missing:
        console.rule(f"parity {command}", align="left")
        main([command, *out])
    page = write_html_of(args.out)
    console.print(f"{page}: {page.stat().st_size / 1024:.0f} KiB, one file")
    return json.loads((args.out / "report.json").read_text(encoding="utf-8"))["ok"]


def _sharded(args: argparse.Namespace) -> bool:
    from parity.core.compile_time import add_flags, known_flags
    from parity.report.report import make_console, print_and_write, print_progress
    from parity.sharded.sharded import GROUPS, QUICK, SHARDING_BUGS, TWO_GPUS, drawn_groups, plant, run_group

    console, start = make_console(), time.perf_counter()
    if args.device == "cpu":
        add_flags(known_flags())
    if args.bugs:
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(zip(SHARDING_BUGS, pool.map(plant, SHARDING_BUGS), strict=True))
        for bug, (ok, red) in outcomes:
            console.print(
                f"{'caught' if ok else 'NOT AS EXPECTED'}: {bug.name} ({bug.framework}, {bug.mesh}): {red[:160]}"
            )
        caught = sum(ok for _, (ok, _) in outcomes)
        console.print(f"{caught} of {len(outcomes)} sharding bugs caught; {time.perf_counter() - start:.0f} s")
        return caught == len(outcomes)
    rows, name = [], "CPU"
    if args.device == "gpu":
        from torch_llm.engine.device import device_kind

        name = f"2 x {device_kind('gpu')}"
    groups = TWO_GPUS if args.device == "gpu" else QUICK if args.quick else (*GROUPS, *drawn_groups(args.seed))
    for group in groups:
        found = run_group(group, device=args.device)
        print_progress(console, str(group), found, time.perf_counter() - start)
        rows += found
    paragraphs = [
        "Every mesh against the specification, which knows no devices: float64, uneven token counts, active clip."
    ]
    return print_and_write(console, args.out, rows, paragraphs, name, seconds=time.perf_counter() - start)


def _calibrate(args: argparse.Namespace) -> bool:
    from parity.commands.calibrate import calibrate, merged, write_figures, write_table
    from parity.report.report import make_console

    console, runs = make_console(), [0]

    def tell(shape: str, seed: int, rows, seconds: float, so_far) -> None:
        runs[0] += 1
        write_figures(args.out / "figures.json", so_far, runs[0])  # what a run cut off leaves behind
        bad = [
            f"{row.check} ({row.item}, {row.dtype}): {row.measured} > {row.allowed} {row.side}"
            for row in rows
            if not row.ok
        ]
        console.print(
            f"  {shape:16} seed {seed}  {counted(len(rows), 'figure')}  ({seconds:.0f} s)  {'; '.join(bad)}",
            markup=False,
        )

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    figures = (
        calibrate(seeds, steps=args.steps, jobs=args.jobs, seconds=args.seconds, on_run=tell) if args.seeds else []
    )
    figures, total = merged(figures, runs[0], args.merge)
    write_figures(args.out / "figures.json", figures, total)
    mutants = OUT / "mutants.json"
    effects = json.loads(mutants.read_text(encoding="utf-8"))["smallest effects"] if mutants.is_file() else None
    write_table(args.out / "tolerances.md", figures, total, "Tolerances and their margins", args.steps, effects)
    alarms = sum(figure.alarms for figure in figures)
    console.print(f"{counted(total, 'run')}, {counted(alarms, 'false alarm')}; {args.out / 'tolerances.md'}")
    return alarms == 0


def _demo(args: argparse.Namespace) -> bool:
    if args.steps < 20:
        raise UserError(f"--steps {args.steps}: the demo needs at least 20 steps")
    from parity.commands.demo import run_demo

    return run_demo(args.out, args.data, args.steps)


def entry() -> None:
    """The console script."""
    keep_freed_memory()
    run_main(main)
