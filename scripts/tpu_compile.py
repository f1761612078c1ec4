"""Compile the train and decode steps for a TPU with its real compiler, on a machine without one, and say what they
would need.

    pip install '.[tpu]'
    python scripts/tpu_compile.py --preset 1b --topology v5e:4x4 --mesh fsdp=16 --batch-size 16 --seq-len 2048
    python scripts/tpu_compile.py --preset 8b --topology v5p:2x4x4 --mesh fsdp=8,tensor=4 --batch-size 8 --seq-len 8192 --remat full
    python scripts/tpu_compile.py --table docs/tpu_compiled.md

Nothing is executed: bytes and collectives are the compiler's, times are bounds from data sheets.
"""

import json
import sys
from pathlib import Path

from llm_common.errors import run_main
from llm_common.processes import end_with_launcher
from llm_tools.flags import make_parser
from llm_tools.tpu import compile_steps, print_row, write_table


def main() -> None:
    end_with_launcher()
    parser = make_parser("tpu_compile.py", __doc__)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--layers", type=int, help="another number of layers than the preset's")
    parser.add_argument("--topology", default="v5e:2x2", help="version and chips, as v5p:2x4x4")
    parser.add_argument("--mesh", default="", help="as data=2,fsdp=4,tensor=2; default: fsdp over all chips")
    parser.add_argument("--batch-size", type=int, help="default: one sequence for each part of the batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--remat", default="full", choices=["none", "dots", "full"])
    parser.add_argument("--compute-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--attention-backend", default="splash", choices=["splash", "fused", "reference"])
    parser.add_argument("--loop", action="store_true", help="layers unrolled, not scanned")
    parser.add_argument("--step", action="append", choices=["train", "decode"], help="default: both")
    parser.add_argument("--out", type=Path, help="append the report to this JSON-lines file")
    parser.add_argument(
        "--table", type=Path, help="compile the 1b and the 8b for every version and write a Markdown table"
    )
    args = parser.parse_args()
    if args.table is not None:
        write_table(args.table)
        return
    for row in compile_steps(args):
        print_row(row)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run_main(main)
