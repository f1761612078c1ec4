"""The command line: `parity run` (the ladder; also the default) and `parity demo` (training and ladder).

parity                                  the ladder on the tiny preset
parity run --check gradients --dtype float64 --seed 7
parity run --model-config path/to/config.json --length 33
parity demo --data my_texts/
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from llm_common.config import DTYPES, PRESETS, ModelConfig, preset
from llm_common.errors import UserError, require_framework, run_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parity", description="Prove that the JAX and the PyTorch side agree, or name the side that differs."
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="the ladder of checks (default)")
    model = run.add_mutually_exclusive_group()
    model.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)} (default: tiny)")
    model.add_argument("--model-config", type=Path, help="a config.json with Hugging Face keys instead of a preset")
    run.add_argument("--check", action="append", help="one check alone; may be repeated (unknown names list the known)")
    run.add_argument("--dtype", action="append", choices=DTYPES, help="one dtype alone; may be repeated")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--batch", type=int, default=3, help="sequences in a batch")
    run.add_argument("--length", type=int, default=13, help="positions in a sequence")
    run.add_argument("--steps", type=int, default=1000, help="steps of a trajectory")
    run.add_argument("--tokens", type=int, default=4000, help="sampled tokens in float32")
    run.add_argument("--device", default="cpu", help="cpu, gpu or tpu, for both frameworks (default: cpu)")
    run.add_argument("--attention", default="reference", choices=["reference", "auto"], help="auto: the fused kernels")
    run.add_argument("--out", type=Path, default=Path("runs/parity"), help="folder of report.json and report.md")
    demo = commands.add_parser("demo", help="train a small model in both frameworks, then the ladder")
    demo.add_argument("--data", help="a UTF-8 file or a folder of .txt and .md files (default: Python's documentation)")
    demo.add_argument("--steps", type=int, default=200, help="training steps of each framework")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = _parser().parse_args(argv)
    for framework in ("jax", "torch"):
        require_framework(framework)
    if args.command == "demo":
        if args.steps < 20:
            raise UserError(f"--steps {args.steps}: the demo needs at least 20 steps")
        from parity.demo import run_demo

        return 0 if run_demo(args.out, args.data, args.steps) else 1
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from parity.ladder import run_checks
    from parity.report import conclude, make_console, print_progress
    from parity.settings import Settings

    settings = Settings(
        cfg=_config(args),
        seed=args.seed,
        dtypes=tuple(args.dtype) if args.dtype else Settings().dtypes,
        batch=args.batch,
        length=args.length,
        steps=args.steps,
        tokens=args.tokens,
        device=args.device,
        attention=args.attention,
    )
    console, start, name = make_console(), time.perf_counter(), settings.device_name()
    console.print(
        f"identical weights into JAX, PyTorch and the specification; seed {settings.seed}, {name}, "
        f"{settings.attention} attention, {settings.cfg}"
    )
    rows = run_checks(settings, tuple(args.check or ()), lambda *found: print_progress(console, *found))
    if not rows:
        raise UserError("nothing was checked: the chosen check has no part in the chosen dtype")
    paragraphs = [f"Seed {settings.seed}, {settings.attention} attention, `{settings.cfg}`."]
    content = {"seconds": time.perf_counter() - start, "settings": dataclasses.asdict(settings)}
    return 0 if conclude(console, args.out, rows, paragraphs, name, **content) else 1


def _config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_file(args.model_config) if args.model_config else preset(args.preset)


def entry() -> None:
    """The console script."""
    run_main(main)
