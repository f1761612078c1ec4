"""What a user's own tests of a pair of models let through: `parity mutants --pytest FILE`.

The file is about our pair, as its tests would be about any: it imports `jax_llm` and `torch_llm` and compares what it
likes. It is run once without a bug, where it must pass, and then once for every bug of one side, in a process of its
own, until a test fails. What it lets through is what its tolerances do not see, and the ladder's checks that do see it
are proposed, those first that see most for their seconds.
"""

import dataclasses
import importlib.util
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_common.errors import UserError
from parity.checks.ladder import processes, rows_of
from parity.mutants.catalogue import Mutant
from parity.mutants.gates import bugs
from parity.mutants.generated.campaign import Answer, Job, Servers
from parity.mutants.generated.operators import Mutation
from parity.mutants.score import QUICK

LIMIT = 600.0  # seconds that the tests may take without a bug
TIME, MORE = 4.0, 30.0  # with one: so many times as long, and so many seconds more


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the tests made of one bug."""

    name: str
    area: str  # of a generated one, its operator
    side: str
    check: str  # the ladder's check that sees it, and its dtype; of a generated one, nothing
    test: str  # the first test that fails; empty if all pass

    @property
    def through(self) -> bool:
        return not self.test


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A check of the ladder that sees some of what was let through."""

    check: str  # with its dtype
    sees: int
    seconds: float


def run_user_tests(
    file: Path,
    generated: Sequence[Mutation] = (),
    jobs: int | None = None,
    on_seen: Callable[[Seen], None] | None = None,
) -> list[Seen]:
    """The verdict of a file of tests on every bug of one side. Raises UserError if it does not pass without one."""
    if importlib.util.find_spec("pytest") is None:
        raise UserError("--pytest needs pytest: pip install pytest")
    if not file.is_file():
        raise UserError(f"--pytest {file}: there is no such file")
    tests = [str(file.resolve())]
    everything: list[Mutant | Mutation] = [*bugs(), *generated]
    with tempfile.TemporaryDirectory() as cache, Servers(jobs or os.cpu_count() or 1, cache) as servers:
        base: Job = {"tests": tests, "limits": {"tests": LIMIT}}
        clean = servers.ask(servers.processes[0], base)
        if "green" not in clean:
            raise UserError(f"--pytest {file}: {_why_not(clean)}; mend that first")
        limit = {"tests": TIME * clean["seconds"]["tests"] + MORE}

        def one(ask: Callable[[Job], Answer], numbered: tuple[int, Mutant | Mutation]) -> tuple[int, Seen]:
            number, bug = numbered
            answer = ask({"tests": tests, "limits": limit} | _planted(bug))
            test = "" if "green" in answer else answer.get("red", {}).get("item") or _what_else(answer)
            if isinstance(bug, Mutant):
                check = f"{bug.runs or bug.check} {bug.dtype}" if bug.check else ""
                return number, Seen(bug.name, bug.area, str(bug.side), check, test)
            side = {"jax_llm": "JAX", "torch_llm": "torch"}.get(bug.file.split("/")[0], "")
            return number, Seen(f"{bug.file}:{bug.line} {bug.name}", bug.operator, side, "", test)

        found: dict[int, Seen] = {}
        for number, seen in servers.each(one, list(enumerate(everything))):
            found[number] = seen
            if on_seen is not None:
                on_seen(seen)
    return [found[number] for number in range(len(everything))]


def _planted(bug: Mutant | Mutation) -> dict[str, Any]:
    if isinstance(bug, Mutant):
        return {"catalogue": [bug.name, bug.side]}
    return {"file": bug.file, "start": bug.start, "end": bug.end, "new": bug.new}


def _why_not(answer: Answer) -> str:
    red = answer.get("red", {})
    if red.get("code") == 5:
        return "there is no test in it"
    return f"{red.get('item') or 'pytest'} fails without a bug" if red else _what_else(answer)


def _what_else(answer: Answer) -> str:
    return answer.get("raised") or ("the tests do not end" if answer["late"] else "pytest itself fails")


def proposals(found: Sequence[Seen], jobs: int | None = None, most: int = 6) -> list[Proposal]:
    """The checks that see most of what the tests let through, those first that see most for their seconds."""
    left = Counter(seen.check for seen in found if seen.through and seen.check)
    with processes(jobs or os.cpu_count() or 1) as pool:
        seconds = {check: pool.submit(_seconds, check) for check, _ in left.most_common(most)}
        proposed = [Proposal(check, left[check], taken.result()) for check, taken in seconds.items()]
    return sorted(proposed, key=lambda one: one.sees / max(one.seconds, 0.1), reverse=True)


def _seconds(check: str) -> float:
    name, dtype = check.split(" ")
    start = time.perf_counter()
    for _ in rows_of(name, dataclasses.replace(QUICK, dtypes=(dtype,))):
        pass
    return time.perf_counter() - start
