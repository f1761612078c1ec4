"""Drawing mutants, planting them, and what became of each: killed by a row of parity, by a unit test, or by nothing.

A campaign lives in a folder: `covered.json` (the lines that each check runs, and how long it takes) and one line of
`outcomes.jsonl` for each mutant, so that a run that is cut off goes on where it was.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from llm_common.config import ExecutionConfig, ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from llm_common.errors import UserError
from parity.checks.ladder import CHECKS
from parity.core.compare import Side
from parity.mutants.generated.operators import Mutation, defaults_of, mutations
from parity.mutants.generated.scope import IN, OUT_FUNCTIONS

ROOT = Path(__file__).parents[3]
SERVER = Path(__file__).with_name("server.py")
# The ladder in two goes: as `parity run --quick` has it, in which most of what shows at all shows, and whole.
# (`noise` measures the frameworks.)
GOES = {
    "quick": {"steps": 60, "tokens": 800, "seeds": 8, "updates": [1, 3, 10], "quick": True},
    "whole": {"steps": 200},
}
CHEAP = 16.0  # seconds: every rung of the model and little else; the lowest that is red has the place
BEGINNING_PROCESSES = ("whole tokenizer", "whole data", "whole bookkeeping", "quick programs")
WORTH = 1.5  # a quick check goes before a whole one that takes so many times as long
TIME = 4.0  # a check may take so many times as long as without a mutant, and
MORE = 30.0  # so many seconds more, before its mutant counts as one that does not end
TEST_LIMIT = 3600.0  # seconds for all tests of one mutant

Job = dict[str, Any]
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    name: str
    file: str
    function: str
    operator: str
    line: int
    old: str
    new: str
    # row: a row of parity is red; error: a check raised; late: one did not end; import: our code could not be imported;
    # tests: unit tests alone failed; survived
    how: str
    check: str = ""
    item: str = ""
    side: str = ""
    place: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def by_parity(self) -> bool:
        return self.how in ("row", "error", "late", "import")

    @property
    def right_side(self) -> bool:
        """Of a row: whether it blames who holds the mutant. Shared code is blamed as such, or as both sides."""
        if self.file.startswith("llm_common/"):
            return self.side not in ("JAX", "torch")
        return self.side == {"jax_llm": "JAX", "torch_llm": "torch"}[self.file.split("/")[0]]

    @property
    def right_place(self) -> bool:
        """Whether the row's place names the function or what its file is for."""
        words = [part.lower().strip("_") for part in self.function.split(".")]
        said = f"{self.place} {self.item}".lower()
        return any(word and word in said for word in (*words, *IN[self.file]))


@functools.cache
def population(files: tuple[str, ...] = tuple(IN)) -> tuple[Mutation, ...]:
    """Every mutation of the files in scope, in the order of the scope and of the text."""
    defaults = defaults_of(ModelConfig, TrainConfig, OptimizerConfig, SamplingConfig, ExecutionConfig)
    found = [m for file in files for m in mutations(file, (ROOT / file).read_text(encoding="utf-8"), defaults)]
    return tuple(m for m in found if (m.file, m.function.split(".")[0]) not in OUT_FUNCTIONS)


def drawn(count: int, seed: int, files: Sequence[str] = tuple(IN)) -> list[Mutation]:
    """`count` of them, each as likely as any other. A larger count begins with the same ones."""
    found = list(population(tuple(files)))
    random.Random(seed).shuffle(found)
    return found[:count]


def named(names: Sequence[str]) -> list[Mutation]:
    """Those whose names begin so."""
    everyone = population()
    found = [m for name in names for m in everyone if m.name.startswith(name)]
    if len(found) < len(names):
        raise UserError(f"no mutation is called {' or '.join(names)!r}; the line it changed may have changed since")
    return found


# --- the processes


class Servers:
    """Some processes of `server.py`; `each` hands a job to the next that is free."""

    def __init__(self, jobs: int, cache: str) -> None:
        from parity.core.compile_time import known_flags

        self.flags = known_flags()
        self.processes = [self._begin(cache) for _ in range(jobs)]

    def _begin(self, cache: str) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(SERVER), str(ROOT), cache]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()  # closes its pipes

    def ask(self, process: subprocess.Popen[str], job: Job) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job | {"flags": self.flags}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process that plants mutants ended by itself")
        return json.loads(line)

    def each(self, work: Callable[[Callable[[Job], Answer], Any], Any], things: Sequence[Any]) -> Iterator[Any]:
        """work(ask, thing) for every thing, as they come."""
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for thing in things:
            waiting.put(thing)

        def serve(process: subprocess.Popen[str]) -> None:
            while True:
                try:
                    thing = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put(work(functools.partial(self.ask, process), thing))
                except BaseException as error:
                    done.put(error)
                    return

        for process in self.processes:
            threading.Thread(target=serve, args=(process,), daemon=True).start()
        for _ in things:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result


# --- which check runs which line


@dataclasses.dataclass(frozen=True)
class Covered:
    """For each go (quick or whole) and check: its seconds, and the lines of each file that it runs."""

    seconds: dict[str, float]  # "quick logits" -> seconds
    lines: dict[str, dict[str, frozenset[int]]]
    sources: str  # a hash of what the lines belong to

    def order(self, mutation: Mutation) -> list[str]:
        """The checks that run a mutation's lines: cheap ones in the ladder's order, from whose lower rungs a place is
        read best, then the others; quick ones where that is worth it. A line that none of them is seen to run may be
        run in a process of its own: then those that begin one.
        """
        ladder = [f"{go} {check}" for go in ("quick", "whole") for check in CHECKS]
        wanted = lines_of(mutation)
        runs = [key for key, files in self.lines.items() if files.get(mutation.file, frozenset()) & wanted]
        dear = {x for x in CHECKS if self.seconds.get(f"whole {x}", 0.0) > WORTH * self.seconds.get(f"quick {x}", 0.0)}
        runs = [key for key in runs if key.startswith("whole") or key.split()[1] in dear]
        rank = lambda key: (0, ladder.index(key) % len(CHECKS)) if self.seconds[key] < CHEAP else (1, self.seconds[key])
        return sorted(runs or BEGINNING_PROCESSES, key=rank)


def lines_of(mutation: Mutation) -> set[int]:
    """The lines of the statement that a mutation is in: of one over several lines any may be counted as run."""
    first, last = mutation.line, mutation.line + mutation.old.count("\n")
    best = set(range(first, last + 1))
    smallest = None
    for node in _statements(mutation.file):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            end = node.end_lineno or node.lineno
            if node.lineno <= first and end >= last and (smallest is None or end - node.lineno <= smallest):
                smallest = end - node.lineno
                header = getattr(node, "body", None)  # of an `if` or a loop, what stands before its block
                stop = header[0].lineno if isinstance(header, list) and header[0].lineno > last else end + 1
                best = set(range(node.lineno, max(stop, last + 1)))
    return best


PARSER = threading.Lock()  # in Python 3.11 two threads that parse at once break each other: gh-106905


def _statements(file: str) -> list[ast.stmt]:
    with PARSER:
        return _parsed(file)


@functools.cache
def _parsed(file: str) -> list[ast.stmt]:
    return [x for x in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if isinstance(x, ast.stmt)]


UNCHECKED = (("parity", "mutants"), ("parity", "commands"), ("parity", "report"))  # no check runs them


def sources_hash() -> str:
    """Of all that a check may run."""
    digest = hashlib.sha256()
    for package in ("jax_llm", "torch_llm", "llm_common", "llm_tools", "parity"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.relative_to(ROOT).parts[:2] not in UNCHECKED:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def covered(servers: Servers, folder: Path, on_check: Callable[[str, float], None]) -> Covered:
    """Runs every check once without a mutant and notes its lines, or reads what was noted of the same sources."""
    file = folder / "covered.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["sources"] == sources_hash():
            return _covered(content)
    keys = [f"{go} {check}" for go in ("whole", "quick") for check in CHECKS if check != "noise"]
    content: dict[str, Any] = {"sources": sources_hash(), "seconds": {}, "lines": {}}

    def one(ask: Callable[[Job], Answer], key: str) -> tuple[str, Answer, Answer]:
        job = {"goes": GOES, "checks": [key], "limits": {key: 3600.0}}
        return key, ask(job | {"lines": list(IN)}), ask(job)

    for key, answer, timed in servers.each(one, keys):
        if "lines" not in answer or "green" not in timed:
            raise UserError(f"{key} is not green without a mutant: {answer}")
        content["lines"][key] = answer["lines"]
        content["seconds"][key] = timed["seconds"][key]
        on_check(key, content["seconds"][key])
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return _covered(content)


def _covered(content: dict[str, Any]) -> Covered:
    lines = {key: {f: frozenset(n) for f, n in files.items()} for key, files in content["lines"].items()}
    return Covered(content["seconds"], lines, content["sources"])


# --- one mutant


def judge(mutation: Mutation, known: Covered, ask: Callable[[Job], Answer]) -> Outcome:
    """Plants it, and runs the checks that run its lines until one of them sees it."""
    checks = known.order(mutation)
    limits = {key: TIME * known.seconds[key] + MORE for key in checks}
    where = {"file": mutation.file, "start": mutation.start, "end": mutation.end, "new": mutation.new}
    answer = ask({"goes": GOES, "checks": checks, "limits": limits} | where)
    spent, late = sum(answer["seconds"].values()), answer["late"]
    how = "survived"
    red = answer.get("red", {})
    if red:
        how = "error" if red["side"] == Side.CHECK or red["note"].startswith("raised") else "row"
    elif late:
        how = "late"
    elif "raised" in answer:
        how = "import"
    told = {key: red.get(key, "") for key in ("check", "item", "side", "place", "note")}
    if how in ("late", "import"):
        told |= {"check": answer.get("at", ""), "note": answer.get("raised", "")}
    one = mutation
    return Outcome(
        one.name, one.file, one.function, one.operator, one.line, one.old, one.new, how, **told, seconds=spent
    )


# --- unit tests, for what parity does not see


def test_survivors(outcomes: Sequence[Outcome], folder: Path, jobs: int, tell: Callable[[str], None]) -> list[Outcome]:
    """The same, with those that a unit test kills marked so. What was found is kept in the folder."""
    file = folder / "tested.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    done = {row["name"]: row["test"] for row in map(json.loads, lines)}
    everyone = {m.name: m for m in population()}
    left = [o for o in outcomes if o.how == "survived" and o.name not in done and o.name in everyone]
    if left:
        known = covered_tests(folder, jobs, tell)
        with ThreadPoolExecutor(jobs) as pool, file.open("a", encoding="utf-8") as stream:
            work = lambda o: (o, killed_by_tests(everyone[o.name], known.order(everyone[o.name])))
            for outcome, test in pool.map(work, left):
                stream.write(json.dumps({"name": outcome.name, "test": test}) + "\n")
                stream.flush()
                done[outcome.name] = test
                tell(f"  {outcome.name} {outcome.file}:{outcome.line}: {test or 'no test fails'}")
    by_test = lambda o: dataclasses.replace(o, how="tests", note=done[o.name])
    return [by_test(o) if o.how == "survived" and done.get(o.name) else o for o in outcomes]


@dataclasses.dataclass(frozen=True)
class CoveredTests:
    """For each file of tests: its seconds, and the lines that it runs, in the processes that it begins, too."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, frozenset[int]]]

    def order(self, mutation: Mutation) -> list[str]:
        wanted = lines_of(mutation)
        runs = [test for test, files in self.lines.items() if files.get(mutation.file, frozenset()) & wanted]
        return sorted(runs, key=lambda test: self.seconds[test])


def covered_tests(folder: Path, jobs: int, tell: Callable[[str], None]) -> CoveredTests:
    """Runs every file of tests once under `coverage`, or reads what was noted."""
    import coverage
    from coverage.exceptions import NoDataError

    file = folder / "covered_tests.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"seconds": {}, "lines": {}}
    tests = sorted(
        str(x.relative_to(ROOT))
        for x in (ROOT / "tests").rglob("test_*.py")
        if x.parent.name != "parity"  # the suite itself
    )

    def one(test: str) -> tuple[str, float, dict[str, list[int]]]:
        with tempfile.TemporaryDirectory() as name:
            config = Path(name) / "coveragerc"
            config.write_text(
                f"[run]\npatch = subprocess, _exit\nparallel = true\ndata_file = {name}/data\n"
                f"include = {','.join(str(ROOT / x) for x in IN)}\n",
                encoding="utf-8",
            )
            begun = time.monotonic()
            command = ["coverage", "run", f"--rcfile={config}", "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
            subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=_test_environment(ROOT),
                capture_output=True,
                check=False,
            )
            seconds, data = time.monotonic() - begun, coverage.Coverage(config_file=str(config))
            with contextlib.suppress(NoDataError):
                data.combine([name])
            found = data.get_data()
            lines = {
                str(Path(x).relative_to(ROOT)): sorted(found.lines(x) or ())
                for x in found.measured_files()
                if Path(x).is_relative_to(ROOT)
            }
        return test, seconds, lines

    left = [test for test in tests if test not in content["lines"]]
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, test) for test in left]):
            test, seconds, lines = done.result()
            content["seconds"][test], content["lines"][test] = seconds, lines
            file.write_text(json.dumps(content) + "\n", encoding="utf-8")
            tell(f"  {test} ({seconds:.0f} s)")
    as_sets = lambda files: {file: frozenset(lines) for file, lines in files.items()}
    return CoveredTests(content["seconds"], {test: as_sets(files) for test, files in content["lines"].items()})


def _test_environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def killed_by_tests(mutation: Mutation, tests: Sequence[str]) -> str:
    """The first test that fails with the mutant in a copy of the repository, or nothing. tests: files, in order."""
    if not tests:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
        file = copy / mutation.file
        file.write_text(mutation.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=_test_environment(copy),
                capture_output=True,
                text=True,
                timeout=TEST_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "a test did not end"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found.group(1) if found else "" if done.returncode == 0 else done.stdout[-200:]


# --- a campaign


def read_outcomes(file: Path) -> dict[str, Outcome]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {one.name: one for one in (Outcome(**json.loads(line)) for line in lines)}


def run_campaign(
    chosen: Sequence[Mutation],
    folder: Path,
    jobs: int,
    on_outcome: Callable[[Outcome], None],
    on_check: Callable[[str, float], None],
    again: bool = False,
    seconds: float = float("inf"),
) -> list[Outcome]:
    """The outcome of every chosen mutant; those of the folder are not planted again unless `again`.

    seconds: begin no mutant after so many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, begun = folder / "outcomes.jsonl", time.monotonic()
    done = {} if again else read_outcomes(file)
    left = [m for m in chosen if m.name not in done]
    if left:
        with tempfile.TemporaryDirectory() as cache, Servers(jobs, cache) as servers:
            known = covered(servers, folder, on_check)

            def one(ask: Callable[[Job], Answer], mutation: Mutation) -> Outcome | None:
                return judge(mutation, known, ask) if time.monotonic() - begun < seconds else None

            with file.open("a", encoding="utf-8") as stream:
                for outcome in servers.each(one, left):
                    if outcome is None:
                        continue
                    stream.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                    stream.flush()
                    done[outcome.name] = outcome
                    on_outcome(outcome)
    return [done[m.name] for m in chosen if m.name in done]
