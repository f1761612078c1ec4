"""Kills and corruptions in great numbers: is anything lost that was saved, is any change of a file read as if it were
right?

    python scripts/soak.py kills --count 10000
    python scripts/soak.py corruptions --count 20000
    python scripts/soak.py kills --kind run --count 500 --seed 7

kills: a process trains (a model of numbers, no framework), saves, exports, prepares or converts, and is killed at a
random moment; then what was there before must be whole, what is there now must be whole or be seen not to be, and no
process may be left. corruptions: a byte, a piece or a file of something saved is changed; reading it must be refused by
name, or give what was saved.

Prints a row for each kind. The exit code is 0 if nothing was lost, nothing wrong was read, and nothing raised but a
clear error.
"""

import json
import time

from rich.console import Console
from rich.table import Table

from llm_common.errors import run_main
from llm_tools.flags import at_least_one, make_parser
from llm_tools.soak import corruptions, kills
from llm_tools.soak_kinds import KINDS

# --- corruptions


def main() -> int:
    parser = make_parser("soak.py", __doc__)
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
