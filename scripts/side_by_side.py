"""Write docs/side_by_side.html: every building block as equation, JAX and PyTorch, taken from the source as it is.

python scripts/side_by_side.py            # or: make docs
python scripts/side_by_side.py --check    # exit code 1 if the page is not that of the source
"""

import argparse

from llm_common.errors import run_main
from llm_tools.side_by_side import PAGE, ROOT, render


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args()
    page = render()
    if args.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        print(f"{PAGE.relative_to(ROOT)} is {'fresh' if fresh else 'out of date: run make docs'}")
        return 0 if fresh else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    run_main(main)
