"""`parity judge`: is a candidate the same program as a reference?"""

import argparse
from pathlib import Path

from llm_common.errors import UserError

FORMATS = ("text", "json")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help="FILE.py:NAME, MODULE:NAME or transformers:FOLDER")
    parser.add_argument("candidate", help="as the reference")
    parser.add_argument(
        "--inputs", type=Path, required=True, help=".npy, or .npz: names are keywords, 0, 1, ... places"
    )
    parser.add_argument("--mode", action="append", choices=("eval", "train"), help="may be repeated (default: eval)")
    parser.add_argument("--layout", help='as "NHWC->NCHW", of inputs and outputs (default: found)')
    parser.add_argument(
        "--weights", choices=("reference", "candidate", "given"), default="reference", help="whose count"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: float64 and float32")
    parser.add_argument(
        "--name", action="append", default=[], metavar="TENSOR=LEAF", help="the candidate's = the reference's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and weights that are drawn")
    parser.add_argument("--output-format", choices=FORMATS, default="text")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the verdict there, too")


def run_judge(args: argparse.Namespace) -> int:
    """The exit code: 0 same, 1 different, 3 not judged. Raises UserError (2) for what cannot be used."""
    names = {}
    for text in args.name:
        tensor, equals, leaf = text.partition("=")
        if not equals or not leaf:
            raise UserError(f"--name {text}: TENSOR=LEAF is needed")
        names[tensor] = leaf
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: at least 0")
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out}: a folder; a file is written")
    from parity.judge.judge import DTYPES as USUAL
    from parity.judge.judge import judge
    from parity.judge.layouts import read_layout
    from parity.judge.loading import load_inputs, load_model

    read_layout(args.layout)
    inputs = load_inputs(args.inputs)
    reference, candidate = load_model(args.reference), load_model(args.candidate)
    verdict = judge(
        reference,
        candidate,
        inputs,
        mode=tuple(args.mode or ("eval",)),
        layout=args.layout,
        names=names or None,
        weights=args.weights,
        dtypes=tuple(args.dtype or USUAL),
        seed=args.seed,
        name=args.candidate,
    )
    print(verdict.json() if args.output_format == "json" else verdict.text())
    if args.out is not None:
        verdict.write(args.out)
    return verdict.exit_code
