"""How fast both frameworks train and decode, as shares of what the device itself reaches, beside other libraries.

    one-model benchmark train --preset 1b --batch-size 16 --seq-len 2048 --peer transformers --out runs/bench
    one-model benchmark decode --preset 1b --batch 1 --batch 32 --peer transformers
    one-model benchmark train --preset demo --compute-dtype float32 --device cpu --peer transformers
    one-model benchmark train --preset 1b --framework torch --profile runs/profile
    one-model benchmark startup --preset 1b
    one-model benchmark tokenizer --vocab-size 32768 --data my_texts/

Every case runs in a process of its own, one after the other; the ceilings (a large matrix product, a large copy) are
measured before and after them. Training: model FLOPs of our own counter over the first ceiling. Decoding: the bytes
that a step must read, weights and cache, over the second. --out writes PREFIX.md, PREFIX.json and PREFIX.png.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from llm_common.config import PRESETS, ExecutionConfig, TrainConfig
from llm_common.errors import UserError, counted
from llm_common.processes import end_with_launcher
from llm_common.text.words import PATTERNS
from llm_tools.bench import tokenizer_cases
from llm_tools.bench.cases import WORK
from llm_tools.bench.measure import run_worker
from llm_tools.bench.report import check, check_prefix, describe, list_cases, summary, write
from llm_tools.flags import add_flags, at_least_one, make_parser, prepare_environment
from llm_tools.frameworks import FRAMEWORKS

WHAT = tuple(name for name in WORK if name != "ceilings")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmark", __doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--framework", choices=[*FRAMEWORKS, "both", "none"], default="both")
    parser.add_argument("--peer", action="append", default=[], help="transformers, transformers+liger, or a file")
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="a config.json instead of a preset")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu: the ceilings are measured with torch")
    parser.add_argument("--groups", type=int, default=5, help="groups of steps, each timed as a whole")
    parser.add_argument("--steps", type=int, default=4, help="steps of a group")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first group; the first compiles")
    parser.add_argument("--batch", type=int, action="append", help="decode: texts at once; may be given several times")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="tokenizer: text (default: Python's own)")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="tokenizer")
    parser.add_argument("--pattern", choices=list(PATTERNS), default="gpt2", help="tokenizer")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="leave a trace there and print the top kernels")
    parser.add_argument("--cache-dir", type=Path, help="of compiled programs")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="of a .md, a .json and a .png file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_flags(parser, TrainConfig, "training; left out, compute-dtype is bfloat16 on a GPU or TPU")
    add_flags(parser, ExecutionConfig, "execution")
    parser.set_defaults(compute_dtype=None, batch_size=None)
    args = parser.parse_args(argv)
    if args.what == "decode" and args.batch_size is not None:
        raise UserError("decode takes --batch, the number of texts, not --batch-size; it may be given several times")
    if args.what not in ("decode", "tokenizer") and args.batch:
        raise UserError(f"{args.what} takes --batch-size, not --batch")
    args.batch_size = TrainConfig().batch_size if args.batch_size is None else args.batch_size
    prepare_environment(args.cache_dir)
    if args.worker is not None:
        end_with_launcher()
        task = json.loads(args.worker)
        print(json.dumps({**task, **WORK[task["what"]](args, task)}), flush=True)
        return
    if args.out is not None:
        check_prefix(args.out)
    if args.what == "tokenizer":
        at_least_one(args, "groups")
        report, results = tokenizer_cases.run(args)
        print(report)
        if args.out is not None:
            write(args.out, report, {"cases": results, "date": date.today().isoformat()})
        return
    check(args)
    sys.argv += ["--compute-dtype", args.compute_dtype, "--compile", args.compile]  # which workers are told
    cases, results = list_cases(args), []
    before = run_worker({"what": "ceilings"})
    if "error" in before:
        raise UserError(f"the device's ceilings cannot be measured: {before['error']}")
    after: dict[str, Any] = {"error": "interrupted before"}
    try:
        with tempfile.TemporaryDirectory() as cache:
            for case in cases:
                folder = f"{cache}/{case.get('side')}"  # empty for the first start of each side
                own = {"JAX_COMPILATION_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
                results.append(run_worker(case, **(own if args.what == "startup" else {})))
                print(describe(results[-1], before), flush=True)
        after = run_worker({"what": "ceilings"})
    finally:  # what was measured is not lost
        report = summary(args, before, after, results)
        print(report, flush=True)
        if args.out is not None and results:
            write(args.out, report, {"ceilings": [before, after], "cases": results, "date": date.today().isoformat()})
    failed = sum("error" in r for r in results)
    if failed:
        raise UserError(f"{failed} of {counted(len(results), 'case')} failed: the table says why")


# --- tables
