"""`parity run --fuzz 30m`: drawn cases until the time is over or one fails; that one is made as small as it can be and
printed.

The lines of `corpus.jsonl` beside this file, if it is there, are tried first: what failed once is put there by hand.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import numpy as np

from llm_common.errors import UserError
from parity.checks.ladder import processes
from parity.checks.run_cases import case_row, explained, short
from parity.core import drawn
from parity.core.case_space import SPACES, fix
from parity.core.compare import Row
from parity.core.compile_time import quick_to_compile
from parity.sides.jax_side import clear_caches
from parity.sides.settings import Settings

CORPUS = Path(__file__).with_name("corpus.jsonl")
KINDS = ("run", "low", "run", "text")  # in turn
FORGET_EVERY = 25
MESH_EVERY = 24  # and of so many one on a mesh: its processes take ten times as long as another case


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A case with what else decides it: a line repeats it."""

    kind: str
    seed: int
    line: str

    @classmethod
    def parse(cls, text: str) -> "Drawn":
        """From "KIND SEED JSON". Raises UserError, naming what is wrong."""
        kind, _, rest = text.strip().partition(" ")
        seed, _, line = rest.strip().partition(" ")
        if kind not in SPACES or not seed.isdecimal() or int(seed) >= 2**32:
            raise UserError(f"--case {text[:100]!r}: expected KIND SEED JSON, with a KIND of {', '.join(SPACES)}")
        found = cls(kind, int(seed), line or "{}")
        found.case()
        return found

    def case(self) -> drawn.Case:
        try:
            return drawn.from_line(self.line, SPACES[self.kind], fix)
        except ValueError as error:
            raise UserError(f"--case: {error}") from None

    def __str__(self) -> str:
        return f"{self.kind} {self.seed} {self.line}"


def draw(number: int, seed: int) -> Drawn:
    """The drawn case with this number."""
    kind = "mesh" if number % MESH_EVERY == MESH_EVERY - 1 else KINDS[number % len(KINDS)]
    rng = np.random.default_rng((seed, 30, number))
    space = SPACES[kind]
    case = drawn.draw(space, rng, fix)
    features = {name: case[name] for name in drawn.needed(case, space)}
    return Drawn(kind, int(rng.integers(2**32)), drawn.to_line(features))


def judge(settings: Settings, one: Drawn) -> Row:
    """The row of a case."""
    case = one.case()
    with quick_to_compile():
        return case_row(settings, one.kind, case, f"{one.kind} {short(case, SPACES[one.kind])}", one.seed)


def judge_and_explain(settings: Settings, one: Drawn) -> Row:
    """The row of a case, and its place if it fails."""
    with quick_to_compile():
        return explained(settings, judge(settings, one), one.kind, one.case(), one.seed)


def _judge_of_many(settings: Settings, one: Drawn, number: int) -> Row:
    """`judge`, in a process that judges thousands: compiled programs, 15 MB a case, are forgotten now and then."""
    if number % FORGET_EVERY == 0:
        clear_caches()
    return judge(settings, one)


def corpus() -> list[Drawn]:
    lines = CORPUS.read_text(encoding="utf-8").splitlines() if CORPUS.is_file() else []
    return [Drawn.parse(line) for line in lines if line.strip() and not line.startswith("#")]


def fuzz(
    settings: Settings, seconds: float, jobs: int, on_row: Callable[[int, Drawn, Row], None], first: int = 0
) -> tuple[int, Drawn | None, Row | None]:
    """How many cases were judged until `seconds` were over or one failed, and the one that failed, explained.

    The cases are those of the settings' seed, from number `first` on.
    """
    end, number, done = time.monotonic() + seconds, first, 0
    waiting: dict[Future[Row], Drawn] = {}
    begun = itertools.count(1)
    past = corpus()
    with processes(jobs) as pool:
        while True:
            while len(waiting) < 2 * jobs and (past or time.monotonic() < end):
                if past:
                    one = past.pop(0)
                else:
                    one = draw(number, settings.seed)
                    number += 1
                waiting[pool.submit(_judge_of_many, settings, one, next(begun))] = one
            if not waiting:
                return done, None, None
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                one, row = waiting.pop(future), future.result()
                done += 1
                on_row(done, one, row)
                if not row.ok:
                    for other in waiting:
                        other.cancel()
                    return done, one, pool.submit(judge_and_explain, settings, one).result()


def seconds_of(text: str) -> float:
    """The seconds of "30m", "90s", "2h" or "45". Raises UserError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e7:
        raise UserError(f"--fuzz {text}: expected a time as 30m, 90s or 2h")
    return seconds
