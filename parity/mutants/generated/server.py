"""A process that plants one mutant after another, each in a fork of its own.

The frameworks are imported once, before the forks, and not used: XLA has no thread yet that a fork could lose. Each
fork then imports the repository's own packages anew, one file changed on its way in, so that constants, defaults and
decorators are as changed as the bodies of functions, and nothing of one mutant is left for the next.

Run as a script, with the root of the repository and a folder for compiled programs; jobs come as lines of JSON, and a
line goes back for each. Nothing of the repository may be imported at the top of this file.
"""

import contextlib
import importlib.machinery
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

THIRD = ("numpy", "jax", "flax.linen", "optax", "torch", "safetensors.numpy", "safetensors.torch", "regex", "rich")
VARIABLE = "ONE_MODEL_TWICE_MUTANT"
GRACE = 60.0  # seconds to import, beside those that the checks may take


def plant(root: Path, edit: dict[str, Any]) -> None:
    """Lets whoever imports the edit's file from now on, or loads it as a script, get the changed text, which is written
    nowhere.
    """
    file = (root / edit["file"]).resolve()
    old, load = file.read_bytes(), importlib.machinery.SourceFileLoader.get_code
    text = (old[: edit["start"]] + edit["new"].encode() + old[edit["end"] :]).decode()

    def get_code(self: Any, fullname: str) -> Any:
        if Path(self.path).resolve() == file:
            return compile(text, self.path, "exec", dont_inherit=True)
        return load(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code


def catalogued(name: list[str]) -> Any:
    """While this is open the bug of the catalogue with this name and side is there."""
    from parity.core.planting import planted
    from parity.mutants.gates import bugs

    return planted(next(bug.edits for bug in bugs() if [bug.name, bug.side] == name))


def run_checks(job: dict[str, Any], tell: Any) -> None:
    """Runs the checks of a job in order until a row is red."""
    from parity.checks.ladder import rows_of
    from parity.sides.settings import Settings

    for key in job["checks"]:
        tell({"check": key})
        go, check = key.split()
        start, red = time.perf_counter(), None
        for row in rows_of(check, Settings(noise=False, blamed_only=True, **job["goes"][go])):
            if not row.ok:
                red = row
                break
        tell({"seconds": time.perf_counter() - start, "of": key})
        if red is not None:
            found = {name: str(getattr(red, name)) for name in ("check", "item", "dtype", "side", "place", "note")}
            tell({"red": {key: value[:300] for key, value in found.items()}})
            return
    tell({"green": True})


def run_tests(job: dict[str, Any], tell: Any) -> None:
    """Runs a user's tests until one of them fails."""
    import pytest

    class First:
        """Notes the first test, or file of tests, that fails."""

        node = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.node = self.node or (report.nodeid if report.failed else "")

        pytest_collectreport = pytest_runtest_logreport

    start, first = time.perf_counter(), First()
    tell({"check": "tests"})
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *job["tests"]], plugins=[first]))
    tell({"seconds": time.perf_counter() - start, "of": "tests"})
    tell({"red": {"check": "tests", "item": first.node, "code": code}} if code else {"green": True})


def child(job: dict[str, Any], root: Path, cache: str, out: int) -> None:
    os.setsid()
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)

    def tell(content: dict[str, Any]) -> None:
        os.write(out, json.dumps(content).encode() + b"\n")

    recorder = None
    try:
        if job.get("file"):
            edit = {name: job[name] for name in ("file", "start", "end", "new")}
            plant(root, edit)
            # processes that the checks begin plant it, too, by `sitecustomize`
            os.environ[VARIABLE] = json.dumps({"root": str(root), "edit": edit})
            beside = str(Path(__file__).parent / "beside")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (beside, os.environ.get("PYTHONPATH", ""))))
        if job.get("lines"):
            import coverage

            recorder = coverage.Coverage(data_file=None, include=[str(root / name) for name in job["lines"]])
            recorder.start()
        from parity.checks.ladder import share_cores

        share_cores(os.cpu_count() or 1, cache, job["flags"])
        run = run_tests if "tests" in job else run_checks
        with catalogued(job["catalogue"]) if "catalogue" in job else contextlib.nullcontext():
            run(job, tell)
        if recorder is not None:
            recorder.stop()
            data = recorder.get_data()
            lines = {str(Path(f).relative_to(root)): sorted(data.lines(f) or ()) for f in data.measured_files()}
            tell({"lines": lines})
    except BaseException as error:  # before the first check: what is planted cannot even be imported
        tell({"raised": f"{type(error).__name__}: {error}"[:300]})


def serve(job: dict[str, Any], root: Path, cache: str) -> dict[str, Any]:
    """One job in a fork. The answer: what the fork told, and whether it was ended for taking too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(job, root, cache, writing)
        finally:
            os._exit(0)
    os.close(writing)
    told: list[dict[str, Any]] = []
    rest, limit, late = b"", GRACE, False
    begun = time.monotonic()
    while True:
        left = begun + limit - time.monotonic()
        ready = left > 0 and select.select([reading], [], [], left)[0]
        if not ready:
            late = True
            break
        piece = os.read(reading, 1 << 16)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            told.append(json.loads(line))
            if "check" in told[-1]:
                begun, limit = time.monotonic(), job["limits"].get(told[-1]["check"], 600.0)
            elif "seconds" in told[-1]:
                begun, limit = time.monotonic(), GRACE
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    answer: dict[str, Any] = {"seconds": {}, "late": late}
    for one in told:
        if "seconds" in one:
            answer["seconds"][one["of"]] = one["seconds"]
        elif "check" in one:
            answer["at"] = one["check"]
        else:
            answer |= one
    if not {"red", "green", "raised"} & answer.keys() and not late:
        answer["raised"] = f"the process ended ({status})"
    return answer


def main() -> None:
    root, cache = Path(sys.argv[1]), sys.argv[2]
    sys.path[0] = str(root)  # in the place of this script's folder
    for name in THIRD:
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(serve(job, root, cache)), flush=True)


if __name__ == "__main__":
    main()
