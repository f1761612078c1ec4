"""The ladder: all checks in order, from initial weights to sampled tokens."""

import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from llm_common.errors import UserError
from llm_common.processes import end_with_parent
from llm_common.run.host_memory import keep_freed_memory
from parity.checks.bookkeeping import check_bookkeeping
from parity.checks.calls import check_calls
from parity.checks.common import check_files, check_random, check_resume, check_schedule
from parity.checks.configs import check_config
from parity.checks.data import check_data, check_evaluation, check_tokenizer
from parity.checks.devices import check_device
from parity.checks.figures import figures
from parity.checks.kernels import check_kernels
from parity.checks.model import check_cache, check_gradients, check_init, check_logits, check_spec
from parity.checks.noise import check_noise, with_noise
from parity.checks.precision import check_precision
from parity.checks.programs import check_programs
from parity.checks.run_cases import check_runs
from parity.checks.tokens import check_tokens
from parity.checks.training import check_adamw, check_library, check_trajectory
from parity.core.compare import JAX, SHARED, TORCH, Row, Side, called_by, crash, raised_in
from parity.core.compile_time import add_flags, known_flags, quick_to_compile, share_compiled
from parity.sides.settings import Settings

CHECKS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "spec": check_spec,
    "config": check_config,
    "random": check_random,
    "tokenizer": check_tokenizer,
    "data": check_data,
    "bookkeeping": check_bookkeeping,
    "init": check_init,
    "logits": check_logits,
    "gradients": check_gradients,
    "precision": check_precision,
    "kernels": check_kernels,
    "noise": check_noise,
    "schedule": check_schedule,
    "adamw": check_adamw,
    "library": check_library,
    "files": check_files,
    "resume": check_resume,
    "calls": check_calls,
    "runs": check_runs,
    "trajectory": check_trajectory,
    "evaluation": check_evaluation,
    "cache": check_cache,
    "programs": check_programs,
    "tokens": check_tokens,
    "device": check_device,
}

SLOW = ("noise", "trajectory", "programs", "device", "library", "calls")  # what `parity run --quick` leaves out
# Begun first where several processes share the checks.
LONG = ("runs", "trajectory", "noise", "precision", "programs", "gradients", "tokens", "cache")
# Judged as a user's programs are compiled, on a CPU, too. `noise` also compares an optimised program with one that is
# not.
OPTIMISED = ("init", "logits", "noise", "adamw", "library", "resume", "trajectory", "evaluation", "cache", "device")


def run_checks(
    settings: Settings,
    names: tuple[str, ...] = (),
    on_check: Callable[[str, list[Row], float], None] | None = None,
    jobs: int = 1,
    pool: ProcessPoolExecutor | None = None,
) -> list[Row]:
    """All rows of the named checks (none named: all). `on_check` is told each check's rows and seconds as they come.

    A check that raises is a failed row with the error in it, not the end of the ladder. jobs: how many processes share
    the checks (those of `pool`, if it is given); each compiles for itself.
    """
    for name in names:
        if name not in CHECKS:
            raise UserError(f"unknown check {name!r}; known: {', '.join(CHECKS)}")
    names = names or tuple(CHECKS)
    found: dict[str, list[Row]] = {}

    def take(name: str, rows: list[Row], seconds: float) -> None:
        found[name] = rows
        if on_check is not None:
            on_check(name, rows, seconds)

    if jobs <= 1 or len(names) == 1:
        for name in names:
            take(name, *_timed(name, settings))
    else:
        with processes(jobs) if pool is None else contextlib.nullcontext(pool) as workers:
            longest_first = sorted(names, key=lambda name: LONG.index(name) if name in LONG else len(LONG))
            futures = {workers.submit(_timed, name, settings): name for name in longest_first}
            for future in as_completed(futures):
                take(futures[future], *future.result())
    return with_noise([row for name in names for row in found[name]])


def run_with_figures(
    settings: Settings, on_check: Callable[[str, list[Row], float], None] | None = None, jobs: int = 1
) -> tuple[list[Row], dict[str, Any]]:
    """The whole ladder, and beside it what the report draws, in the same processes."""
    if jobs <= 1:
        return run_checks(settings, (), on_check), figures(settings)
    with processes(jobs) as pool:
        drawn = pool.submit(figures, settings)
        return run_checks(settings, (), on_check, jobs, pool), drawn.result()


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores, and what they compile: a program that one has compiled the others read from a
    folder.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with XLA's threads would hang
    flags = known_flags()
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, context, _start, (jobs, cache, flags)) as pool,
    ):
        yield pool


def _start(jobs: int, cache: str, flags: str) -> None:
    end_with_parent()
    share_cores(jobs, cache, flags)


def share_cores(jobs: int, cache: str, flags: str) -> None:
    """Lets this process be one of `jobs` that share the cores, and what they compile. XLA reads its threads when it is
    first used.
    """
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    add_flags(flags)
    if jobs >= (os.cpu_count() or 1):
        add_flags("--xla_cpu_multi_thread_eigen=false")
    share_compiled(cache)


def _timed(check: str, settings: Settings) -> tuple[list[Row], float]:
    start = time.perf_counter()
    return list(rows_of(check, settings)), time.perf_counter() - start


def rows_of(check: str, settings: Settings) -> Iterator[Row]:
    """The rows of one check as they come; if it raises, the last of them is the error."""
    try:
        yield from _compiled_rows(check, settings)
    except Exception as error:  # whatever a broken side raises is a finding, and the rows before it stay
        row = crash(check, error)
        if row.side == SHARED and (caller := called_by(error)):
            row = dataclasses.replace(row, side=_who_raises(check, settings, caller))
        yield row


def _compiled_rows(check: str, settings: Settings) -> Iterator[Row]:
    quick = settings.device == "cpu" and not settings.full and (settings.quick or check not in OPTIMISED)
    with quick_to_compile() if quick else contextlib.nullcontext():
        yield from CHECKS[check](settings)


def _who_raises(check: str, settings: Settings, caller: Side) -> Side:
    """Who is to blame for what shared code raised when a side called it: that side, unless the other one gets the same
    from it.
    """
    other = TORCH if caller == JAX else JAX
    try:
        for _ in _compiled_rows(check, dataclasses.replace(settings, only=other)):
            pass
    except Exception as error:
        return SHARED if raised_in(error)[0] == SHARED else caller
    return caller
