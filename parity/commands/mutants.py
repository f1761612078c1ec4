"""`parity mutants`: bugs of the catalogue, generated ones, published tolerances and a user's own tests before them."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, counted


def add_flags(parser: argparse.ArgumentParser, out: Path) -> None:
    """out: the folder for what is found, by default."""
    parser.add_argument("words", nargs="*", help="only those with one of these words in their area or name")
    parser.add_argument("--quick", action="store_true", help="one or two of each area")
    parser.add_argument("--list", action="store_true", help="show what would be planted, and where")
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument(
        "--generated",
        metavar="N",
        nargs="?",
        type=int,
        const=100,
        help="N small edits drawn by the seed (default: 100)",
    )
    parser.add_argument("--gates", action="store_true", help="what tolerances that others publish let through")
    parser.add_argument(
        "--pytest", type=Path, metavar="FILE", help="what your own tests of this pair of models let through"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --generated")
    parser.add_argument("--name", action="append", default=[], help="of --generated: this mutant again")
    parser.add_argument("--file", action="append", default=[], help="of --generated: of this file alone")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of --generated: begin none after so many")
    parser.add_argument("--tests", action="store_true", help="of --generated: unit tests for what parity does not see")


class Progress:
    """Tells what is remarkable of a result, and else how many there are, now and then."""

    def __init__(self, console: Any, every: int, remark: Callable[[Any], str] = lambda result: "") -> None:
        self.console, self.every, self.remark = console, every, remark
        self.start, self.done = time.perf_counter(), 0

    def __call__(self, result: Any) -> None:
        self.done += 1
        if remark := self.remark(result):
            self.console.print(f"  {remark}", markup=False, soft_wrap=True)
        elif self.done % self.every == 0:
            self.console.print(f"  {self.done} ({time.perf_counter() - self.start:.0f} s)")


def _generated(args: argparse.Namespace) -> bool:
    from parity.mutants.generated.campaign import Outcome, drawn, named, run_campaign, test_survivors
    from parity.mutants.generated.operators import described
    from parity.mutants.generated.scope import IN
    from parity.mutants.generated.table import markdown, reasons, sentence, summary
    from parity.report.report import make_console

    unknown = [file for file in args.file if file not in IN]
    if unknown:
        raise UserError(f"--file {unknown[0]}: not in parity/mutants/generated/scope.py; known: {', '.join(IN)}")
    console, start, folder = make_console(), time.perf_counter(), args.out / "generated"
    chosen = named(args.name) if args.name else drawn(args.generated, args.seed, args.file or tuple(IN))
    if args.list:
        for mutation in chosen:
            console.print(str(mutation), markup=False, soft_wrap=True)
        return True
    jobs, known = args.jobs or os.cpu_count() or 1, reasons()
    console.print(f"planting {counted(len(chosen), 'generated mutant')}; outcomes so far are kept in {folder}")

    def said(outcome: Outcome) -> str:
        return f"survived: {described(outcome)}" if outcome.how == "survived" and outcome.name not in known else ""

    cover = lambda key, seconds: console.print(f"  without a mutant: {key} ({seconds:.0f} s)")
    outcomes = run_campaign(
        chosen, folder, jobs, Progress(console, 25, said), cover, again=bool(args.name), seconds=args.seconds
    )
    if args.tests:
        outcomes = test_survivors(outcomes, folder, jobs, lambda text: console.print(text, markup=False))
    for outcome in outcomes if args.name else []:
        console.print(outcome, markup=False)
    console.print(sentence(outcomes))
    if not args.name:
        (folder / "generated.md").write_text(
            markdown(outcomes, args.seed, time.perf_counter() - start), encoding="utf-8"
        )
        console.print(f"{folder / 'generated.md'}")
    return summary(outcomes)["survived"] == 0


def _gates(args: argparse.Namespace) -> bool:
    from parity.mutants.gates import GATES, bugs, draw, markdown, run_gates, to_json
    from parity.report.report import make_console

    console, start = make_console(), time.perf_counter()
    console.print(f"{len(bugs())} bugs of one side before {len(GATES)} published rules")
    verdicts = run_gates(args.jobs, Progress(console, 20))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gates.json").write_text(to_json(verdicts), encoding="utf-8")
    (args.out / "gates.md").write_text(markdown(verdicts), encoding="utf-8")
    draw(verdicts, args.out / "gates.png")
    console.print(f"{time.perf_counter() - start:.0f} s; {args.out / 'gates.md'}, {args.out / 'gates.png'}")
    return True


def _user_tests(args: argparse.Namespace) -> bool:
    from rich.table import Table

    from parity.mutants.generated.campaign import drawn
    from parity.mutants.generated.scope import IN
    from parity.mutants.generated.user_tests import proposals, run_user_tests
    from parity.report.report import make_console

    console, start = make_console(), time.perf_counter()
    sides = [file for file in IN if not file.startswith("llm_common/")]  # what both share no pair of them can see
    generated = drawn(args.generated, args.seed, sides) if args.generated else []
    found = run_user_tests(args.pytest, generated, args.jobs, Progress(console, 20))
    table = Table("kind of bug", "planted", "seen", "let through", title=f"{args.pytest} on bugs of one side")
    for area in dict.fromkeys(seen.area for seen in found):
        mine = [seen for seen in found if seen.area == area]
        names = ", ".join(f"{seen.name} ({seen.side})" for seen in mine if seen.through)
        table.add_row(area, str(len(mine)), str(sum(not seen.through for seen in mine)), names)
    console.print(table)
    seen = sum(not one.through for one in found)
    console.print(
        f"{args.pytest} sees {seen} of {counted(len(found), 'bug')}: {100 * seen / len(found):.0f} %", markup=False
    )
    proposed = proposals(found, args.jobs)
    for one in proposed:
        check, dtype = one.check.split(" ")
        console.print(
            f"  parity run --check {check} --dtype {dtype} sees {one.sees} of those that it lets through, in "
            f"{one.seconds:.1f} s",
            markup=False,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"file": str(args.pytest), "bugs": [vars(x) for x in found], "proposed": [vars(x) for x in proposed]}
    (args.out / "user_tests.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{time.perf_counter() - start:.0f} s; {args.out / 'user_tests.json'}")
    return True


def run_mutants(args: argparse.Namespace) -> bool:
    if args.pytest is not None:
        return _user_tests(args)
    if args.gates:
        return _gates(args)
    if args.generated is not None or args.name:
        return _generated(args)
    from parity.mutants.score import plant_all, print_outcomes, select, to_json
    from parity.report.report import make_console

    console, chosen = make_console(), select(args.words, args.quick)
    if args.list:
        for m in chosen:
            where = "; ".join(edit.target for edit in m.edits)
            console.print(f"{m.area}: {m.name}  [dim]{where}[/dim]  {m.check} {m.side} {m.place}", soft_wrap=True)
        return True
    start = time.perf_counter()
    console.print(f"planting {counted(len(chosen), 'bug')}, one by one")
    said = lambda outcome: "" if outcome.ok else f"not as expected: {outcome.area}: {outcome.name}"
    outcomes = plant_all(chosen, args.jobs, Progress(console, 25, said))
    print_outcomes(console, outcomes)
    args.out.mkdir(parents=True, exist_ok=True)
    content = to_json(outcomes) | {"seconds": time.perf_counter() - start}
    (args.out / "mutants.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"{content['seconds']:.0f} s; {args.out / 'mutants.json'}")
    return all(outcome.ok for outcome in outcomes)
