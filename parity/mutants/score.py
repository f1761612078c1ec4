"""The suite's test of itself: realistic porting bugs are planted one by one, and each must go red where it should.

For every bug: is it caught, at the expected check, on the right side, and at the right place? And what is equal by
mathematics must stay green. Bugs in shared code, or in both sides alike, are seen by the specification alone.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from rich.console import Console
from rich.table import Table

from llm_common.errors import UserError, counted
from parity.checks.ladder import processes, rows_of
from parity.core.compare import Row
from parity.core.planting import planted
from parity.mutants.catalogue import EQUIVALENTS, MUTANTS, Mutant
from parity.sides.jax_side import clear_train_step
from parity.sides.settings import Settings

QUICK = Settings(steps=20, tokens=320, updates=(1, 3), seeds=2, noise=False, blamed_only=True)
EFFECT_WANTED = 10.0  # a tolerance lies below a tenth of what it is there to see
# what must stay green though the code is another: equal by mathematics
EQUIVALENT_CHECKS = {
    "model": ("logits float64", "gradients float64", "precision bfloat16", "cache float64"),
    "training": ("schedule float64", "adamw float64"),
    "sampler": ("tokens float64", "tokens bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the suite made of one planted bug."""

    name: str
    area: str
    level: str  # the check expected to see it
    expected: tuple[str, str]  # side, place
    found: tuple[str, str, str]  # check, side, place of the first red row; empty if none
    note: str
    effect: float  # measured / allowed, the largest over the red rows looked at
    seconds: float
    equivalent: bool = False

    @property
    def caught(self) -> bool:
        return bool(self.found[0]) and self.effect >= EFFECT_WANTED

    @property
    def right_check(self) -> bool:
        return self.found[0] == self.level.split()[0]

    @property
    def right_side(self) -> bool:
        return self.found[1] == self.expected[0]

    @property
    def right_place(self) -> bool:
        return not self.expected[1] or self.found[2] == self.expected[1]

    @property
    def ok(self) -> bool:
        if self.equivalent:
            return not self.found[0]
        return self.caught and self.right_check and self.right_side and self.right_place


def run_mutant(mutant: Mutant, settings: Settings = QUICK) -> Outcome:
    """Plant a bug, run the check that should see it until a row is red by a wide margin, and take the bug out again."""
    start = time.perf_counter()
    red: list[Row] = []
    with planted(mutant.edits), uncompiled():
        for row in _rows(mutant, settings):
            if not row.ok:
                red.append(row)
                if _effect(row) >= EFFECT_WANTED and not mutant.equivalent:
                    break
    first = red[0] if red else None
    return Outcome(
        mutant.name,
        mutant.area,
        mutant.check if mutant.equivalent else f"{mutant.check} {mutant.dtype}",
        (mutant.side, mutant.place),
        (first.check, first.side, first.place) if first else ("", "", ""),
        first.note if first else "",
        max(map(_effect, red), default=0.0),
        time.perf_counter() - start,
        mutant.equivalent,
    )


def _rows(mutant: Mutant, settings: Settings) -> Iterator[Row]:
    levels = (
        EQUIVALENT_CHECKS[mutant.check] if mutant.equivalent else (f"{mutant.runs or mutant.check} {mutant.dtype}",)
    )
    for level in levels:
        check, dtype = level.split()
        yield from rows_of(check, dataclasses.replace(settings, dtypes=(dtype,)))


def _effect(row: Row) -> float:
    """How far over its tolerance a red row is; a count that must be 0 has no measure."""
    if not math.isfinite(row.measured) or row.allowed == 0:
        return math.inf
    return row.measured / row.allowed


def uncompiled():
    """JAX without jit: nothing is traced, so a planted bug needs no compilation, and nothing of it stays behind."""
    clear_train_step()
    return jax.disable_jit()


def clean_run(level: tuple[str, str]) -> Outcome:
    """The same check without a bug: it must be green."""
    check, dtype = level
    return dataclasses.replace(
        run_mutant(Mutant(f"no bug: {check}", "clean", (), check, "", dtype=dtype)), equivalent=True
    )


def select(names: Sequence[str] = (), quick: bool = False) -> list[Mutant]:
    """The mutants with one of some words in their name or area, or all; quick: one or two of each area."""
    found = [m for m in (*MUTANTS, *EQUIVALENTS) if not names or any(word in f"{m.area}: {m.name}" for word in names)]
    if not found:
        areas = ", ".join(dict.fromkeys(m.area for m in MUTANTS))
        raise UserError(f"no planted bug is called {', '.join(names)!r}; areas: {areas}")
    return [m for m in found if m.quick] if quick else found


def plant_all(
    mutants: Sequence[Mutant], jobs: int | None = None, on_outcome: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """The outcome of every mutant, and of every check without a bug, over some processes (default: one for each
    core).
    """
    jobs = min(jobs or os.cpu_count() or 1, len(mutants))
    levels = sorted({(m.runs or m.check, m.dtype) for m in mutants if not m.equivalent})
    outcomes: list[Outcome] = []

    def take(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)

    if jobs <= 1:
        for mutant in mutants:
            take(run_mutant(mutant))
        for level in levels:
            take(clean_run(level))
        return outcomes
    with processes(jobs) as pool:
        futures = [pool.submit(run_mutant, mutant) for mutant in mutants]
        futures += [pool.submit(clean_run, level) for level in levels]
        for future in futures:
            take(future.result())
    return outcomes


# --- what a person reads


def score(outcomes: Sequence[Outcome]) -> dict[str, int]:
    bugs = [o for o in outcomes if not o.equivalent]
    placed = [o for o in bugs if o.expected[1]]
    return {
        "bugs": len(bugs),
        "shared or in both sides": sum(o.expected[0] not in ("JAX", "torch") for o in bugs),
        "caught": sum(o.caught for o in bugs),
        "at the expected check": sum(o.caught and o.right_check for o in bugs),
        "right side": sum(o.caught and o.right_side for o in bugs),
        "with a place": len(placed),
        "localised": sum(o.caught and o.right_place for o in placed),
        "without a bug": sum(o.equivalent for o in outcomes),
        "false alarms": sum(o.equivalent and bool(o.found[0]) for o in outcomes),
    }


def smallest_effects(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, str]]:
    """Level -> the smallest effect seen there, in units of what is allowed, and the bug that made it."""
    smallest: dict[str, tuple[float, str]] = {}
    for o in outcomes:
        if not o.equivalent and o.caught and (o.level not in smallest or o.effect < smallest[o.level][0]):
            smallest[o.level] = (o.effect, o.name)
    return dict(sorted(smallest.items()))


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    wrong = [o for o in outcomes if not o.ok]
    if wrong:
        table = Table(title="not as expected", title_justify="left", pad_edge=False)
        for column in ("bug", "expected", "found", "effect"):
            table.add_column(column)
        for o in wrong:
            expected = "nothing" if o.equivalent else " / ".join((o.level, *o.expected))
            table.add_row(f"{o.area}: {o.name}", expected, f"{' / '.join(o.found)} {o.note}", f"{o.effect:.1e}")
        console.print(table)
    table = Table(title="the smallest bug that each level sees", title_justify="left", pad_edge=False)
    for column in ("level", "effect / allowed", "bug"):
        table.add_column(column)
    for level, (effect, name) in smallest_effects(outcomes).items():
        table.add_row(level, "exact" if math.isinf(effect) else f"{effect:.1e}", name)
    console.print(table)
    s = score(outcomes)
    console.print(
        f"[bold {'red' if wrong else 'green'}]{s['caught']} of {s['bugs']} planted bugs caught[/] "
        f"({s['shared or in both sides']} of them in shared code or in both sides), {s['right side']} with the right "
        "side, "
        f"{s['localised']} of {s['with a place']} at the right place; {counted(s['false alarms'], 'false alarm')} in "
        f"{counted(s['without a bug'], 'run')} without a bug"
    )


def to_json(outcomes: Sequence[Outcome]) -> dict:
    rows = []
    for o in outcomes:
        row = dataclasses.asdict(o) | {"ok": o.ok, "effect": str(o.effect) if math.isinf(o.effect) else o.effect}
        rows.append(row)
    effects = {
        level: ["exact" if math.isinf(e) else e, name] for level, (e, name) in smallest_effects(outcomes).items()
    }
    return {"score": score(outcomes), "smallest effects": effects, "outcomes": rows}
