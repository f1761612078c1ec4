"""Loss, learning rate, gradient norm and speed of several runs in one picture, or in one page that needs nothing else.

    one-model plot-runs runs/jax runs/torch --out curves.png
    one-model plot-runs runs/jax runs/torch --out curves.html

Of two or more runs the difference of the loss from the first run is drawn too. A line marks where a run changed
frameworks.
"""

from collections.abc import Sequence
from pathlib import Path

from llm_common.errors import UserError, require_package
from llm_tools.flags import make_parser
from llm_tools.run_page import draw, page, read_run


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("plot-runs", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their log files")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help=".png, .svg, .pdf or .html")
    parser.add_argument("--smooth", type=int, default=1, help="draw running means over so many steps")
    args = parser.parse_args(argv)
    require_package("matplotlib", "parity")
    if args.smooth < 1:
        raise UserError(f"--smooth {args.smooth}: must be at least 1")
    if args.out.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise UserError(f"--out {args.out}: must end in .png, .svg, .pdf or .html")
    runs = [read_run(path) for path in args.runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".html":
        args.out.write_text(page(runs, args.smooth), encoding="utf-8")
    else:
        draw(runs, args.smooth).savefig(args.out, dpi=120)
    print(f"{args.out}: {', '.join(run['name'] for run in runs)}")
