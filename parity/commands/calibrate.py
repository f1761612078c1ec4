"""How far every tolerance is from what correct code does, and from what the bugs do: the ladder over many seeds and
shapes.

Writes a table with the largest figure that correct code gave, what was allowed there, and the smallest planted bug's
effect. A red row on correct code is a false alarm, and is printed with its seed and shape.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llm_common.config import ModelConfig, preset
from llm_common.processes import end_with_parent
from llm_common.run.log import environment
from parity.checks.ladder import CHECKS, rows_of
from parity.checks.noise import with_noise
from parity.core.compare import Row
from parity.core.compile_time import share_compiled
from parity.sides.settings import Settings
from parity.trace.trace import local_allowed, own_errors, trace

TINY = preset("tiny")
# name -> config, sequences in a batch, positions
SHAPES: dict[str, tuple[ModelConfig, int, int]] = {
    "tiny": (TINY, 3, 13),
    "tied, long": (dataclasses.replace(TINY, tie_word_embeddings=True, num_key_value_heads=1), 2, 40),
    "one small layer": (
        ModelConfig(64, 16, 24, 1, 2, 1, 8, max_position_embeddings=64),
        4,
        9,
    ),
    "wide": (ModelConfig(320, 96, 160, 2, 6, 2, 16, max_position_embeddings=64, rope_theta=500_000.0), 2, 24),
    "deep": (ModelConfig(128, 24, 40, 5, 4, 4, 6, max_position_embeddings=64, rms_norm_eps=1e-6), 2, 11),
}


@dataclasses.dataclass
class Figure:
    """What correct code gave for one kind of row over all runs."""

    check: str
    item: str
    dtype: str
    largest: float = 0.0
    allowed: float = 0.0  # in the run with the largest share
    share: float = 0.0  # the largest measured / allowed
    runs: int = 0
    alarms: int = 0

    def add(self, row: Row) -> None:
        share = row.measured / row.allowed if row.allowed else (math.inf if row.measured else 0.0)
        if self.runs == 0 or share > self.share:
            self.largest, self.allowed, self.share = row.measured, row.allowed, share
        self.runs += 1
        self.alarms += not row.ok


def one_run(shape: str, seed: int, steps: int, checks: tuple[str, ...]) -> tuple[str, int, list[Row], float]:
    """The rows of the whole ladder and of the traces for one shape and seed."""
    start = time.perf_counter()
    cfg, batch, length = SHAPES[shape]
    settings = Settings(cfg=cfg, seed=seed, batch=batch, length=length, steps=steps, noise=False)
    rows = [row for check in checks for row in rows_of(check, settings)]
    for dtype in settings.dtypes if "logits" in checks else ():
        found = trace(settings, dtype=dtype, optimizer=False)
        for side in found.sides:
            error = max(own_errors(side), default=math.inf)
            ok = error <= local_allowed(dtype)
            rows.append(
                Row("trace", "one module, given identical inputs", dtype, error, local_allowed(dtype), ok, side.side)
            )
    return shape, seed, with_noise(rows), time.perf_counter() - start


def calibrate(
    seeds: Iterable[int],
    shapes: Iterable[str] = tuple(SHAPES),
    steps: int = 1000,
    jobs: int = 2,
    checks: tuple[str, ...] = tuple(CHECKS),
    seconds: float = math.inf,
    on_run: Callable[[str, int, list[Row], float, list[Figure]], None] | None = None,
) -> list[Figure]:
    """The figures over all seeds and shapes. seconds: no run is begun after so many."""
    figures: dict[tuple[str, str, str], Figure] = {}
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    turn = context.Value("i", 0)
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, context, _start_worker, (cache, turn)) as pool,
    ):
        futures = [pool.submit(one_run, shape, seed, steps, checks) for seed in seeds for shape in shapes]
        for future in as_completed(futures):
            if future.cancelled():
                continue
            shape, seed, rows, took = future.result()
            for row in rows:
                key = (row.check, _kind(row.item), row.dtype)
                figures.setdefault(key, Figure(*key)).add(row)
            if on_run is not None:
                on_run(shape, seed, rows, took, list(figures.values()))
            if time.perf_counter() - begun > seconds:
                for waiting in futures:
                    waiting.cancel()
    return list(figures.values())


def _start_worker(cache: str, turn: Any) -> None:
    """One core for each process: XLA and torch would else start as many threads in each as there are cores."""
    end_with_parent()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        with turn.get_lock():
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[turn.value % len(cores)]})
            turn.value += 1
    share_compiled(cache)  # all seeds of a shape run the same programs


def _kind(item: str) -> str:
    """What rows of all seeds and shapes have in common."""
    item = re.sub(r"^(run|text|low)\b.*", r"\1: any case", item)  # of the settings, whose cases are others in every run
    item = re.sub(r"\bseed \d+", "seed", item)
    item = re.sub(r", of \d+|of \d+ kinds|, \d+ states", "", item)
    return re.sub(r"(table of|against) \d+", r"\1 n", item)


def write_table(
    path: Path, figures: list[Figure], runs: int, title: str, steps: int, effects: dict[str, Any] | None = None
) -> None:
    """A dated Markdown table. effects: level -> smallest effect of a planted bug over what is allowed there."""
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items() if version)
    alarms = sum(f.alarms for f in figures)
    lines = [
        f"# {title}",
        "",
        f"{runs} runs of the whole ladder, each with another seed or another of {len(SHAPES)} shapes, trajectories "
        f"of {steps} steps: "
        f"**{alarms} false alarms**.",
        f"{date.today().isoformat()}, Python {environment()['python']}, {environment()['system']}; {versions}. "
        "Made by `parity calibrate`.",
        "",
        "The margin is what is allowed over the largest figure that correct code gave. The last column is the "
        "smallest planted "
        "bug of that check and dtype, in units of what is allowed (`parity mutants`).",
        "",
        "| check | what | dtype | largest | allowed there | margin | smallest bug |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [*CHECKS, "loss", "trace"]
    rank = lambda f: order.index(f.check) if f.check in order else len(order)
    for f in sorted(figures, key=rank):
        margin = "exact" if f.allowed == 0 else "-" if not f.largest else f"{1 / f.share:.1f}"
        effect = (effects or {}).get(f"{f.check} {f.dtype or 'float64'}")
        bug = "" if effect is None else "exact" if effect[0] == "exact" else f"{float(effect[0]):.0e}"
        numbers = f"{f.largest:.1e} | {f.allowed:.1e}" if f.allowed else f"{f.largest:.0f} | 0"
        item = f.item.replace("|", "\\|")
        lines.append(f"| {f.check} | {item} | {f.dtype} | {numbers} | {margin} | {bug} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_figures(path: Path, figures: list[Figure], runs: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: str(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(f).items()} for f in figures]
    path.write_text(json.dumps({"runs": runs, "figures": rows}, indent=1) + "\n", encoding="utf-8")


def merged(figures: list[Figure], runs: int, files: list[Path]) -> tuple[list[Figure], int]:
    """The figures together with those of other calibrations, and the number of runs."""
    by_key = {(f.check, f.item, f.dtype): f for f in figures}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        runs += content["runs"]
        for row in content["figures"]:
            other = Figure(**(row | {k: float(row[k]) for k in ("largest", "allowed", "share")}))
            mine = by_key.setdefault((other.check, other.item, other.dtype), other)
            if mine is other:
                continue
            if other.share > mine.share:
                mine.largest, mine.allowed, mine.share = other.largest, other.allowed, other.share
            mine.runs, mine.alarms = mine.runs + other.runs, mine.alarms + other.alarms
    return list(by_key.values()), runs
