"""What measuring scripts share: batches that cost nothing, a device's ceilings, workers in processes of their own,
profiles.
"""

import contextlib
import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, TrainConfig
from llm_common.data.datasets import host_rows
from llm_common.processes import lifeline
from llm_common.run.log import environment


class RandomTokens:
    """Batches of random tokens: every step the same rows in another order, so that reading costs nothing.

    Where the run has a document mask, some five documents to a row.
    """

    def __init__(self, cfg: ModelConfig, train: TrainConfig) -> None:
        rng = np.random.default_rng(0)
        self.rows = rng.integers(0, cfg.vocab_size, (train.batch_size, train.seq_len + 1)).astype(np.int32)
        if train.document_separator is not None:
            self.rows[rng.random(self.rows.shape) < 4 / train.seq_len] = train.document_separator

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows[[number % len(self.rows) for number in host_rows(step, len(self.rows), host, n_hosts)]]
        return rows[:, :-1], rows[:, 1:]

    def fingerprint(self) -> dict[str, Any]:
        return {}


def run_worker(task: dict[str, Any], **variables: str) -> dict[str, Any]:
    """Run this script again with `--worker TASK` in a process of its own; what it printed as JSON, or {"error":
    ...}.
    """
    task = {**task, "started": time.time()}
    command = [sys.executable, *sys.argv, "--worker", json.dumps(task)]
    result = run_json(command, {**os.environ, **variables})
    return {**task, **result} if "error" in result else result


def run_json(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a process printed as its last line, which is JSON, or {"error": why there is none}."""
    with lifeline() as (descriptor, variables):
        process = subprocess.run(
            command,
            env={**environment, **variables},
            pass_fds=[descriptor],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = process.stdout.splitlines()
    if process.returncode == 0 and lines and lines[-1].startswith("{"):  # what stands before it, others have printed
        return json.loads(lines[-1])
    words = (process.stderr.strip() or process.stdout.strip()).splitlines()[-12:]
    end = (
        f"ended with code {process.returncode}"
        if process.returncode >= 0
        else f"killed by signal {-process.returncode}"
    )
    return {"error": " / ".join(words)[-1500:] or end}


def quartiles(values: Any) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75)]


def versions(*names: str) -> dict[str, str]:
    """The installed versions of some packages."""
    known = environment()["versions"]

    def version(name: str) -> str:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return getattr(sys.modules.get(name), "__version__", "of unknown version")

    return {name: known.get(name) or version(name) for name in names}


def ceilings(device: str, compute_dtype: str) -> dict[str, float]:
    """What the device reaches on a large matrix product, FLOP/s, and on a large copy, bytes read and written a second.

    Measured with torch, on random numbers: zeros run faster on a GPU.
    """
    import torch

    from torch_llm.engine.device import matmul_precision, select_device

    target, dtype = select_device(device), getattr(torch, compute_dtype)
    small = target.type == "cpu"
    n, size = (2048, 2**26) if small else (8192, 2**32)
    a, b = (torch.randn(n, n, device=target).to(dtype) for _ in range(2))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=target)
    destination = torch.empty_like(source)
    synchronize = (lambda: None) if small else torch.cuda.synchronize

    def rate(work: Callable[[], Any], amount: float) -> float:
        times = []
        for _ in range(3 if small else 4):
            synchronize()
            start = time.perf_counter()
            for _ in range(2 if small else 10):
                work()
            synchronize()
            times.append((time.perf_counter() - start) / (2 if small else 10))
        return amount / float(np.median(times[1:]))

    with matmul_precision(compute_dtype):
        products = rate(lambda: torch.matmul(a, b), 2.0 * n**3)
    return {"flops": products, "bytes": rate(lambda: destination.copy_(source), 2.0 * size)}


@contextlib.contextmanager
def profiled(framework: str, folder: Path | None) -> Iterator[None]:
    """While this is open a profiler runs; it leaves a trace for Perfetto in `folder`. None: no profiler."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if framework == "jax":
        import jax

        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            yield
        return
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    profile.export_chrome_trace(str(folder / "trace.json.gz"))


def top_kernels(folder: Path, steps: int, n: int = 25) -> list[dict[str, Any]]:
    """The kernels of a trace that took longest: name, milliseconds and calls a step, and the share of all kernels'
    time.
    """
    files = sorted(folder.rglob("perfetto_trace.json.gz")) + sorted(folder.rglob("trace.json.gz"))
    if not files:
        return []
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)
    events = events["traceEvents"] if isinstance(events, dict) else events
    names = {e["pid"]: e["args"].get("name", "") for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"].get("name", "") for e in events if e.get("name") == "thread_name"}

    def on_device(event: dict[str, Any]) -> bool:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            return True  # torch
        if "device:" not in names.get(event.get("pid"), ""):
            return False
        thread = threads.get((event["pid"], event.get("tid")), "")
        return "Stream" in thread  # the compiler's view of the same kernels is on threads of other names

    total, calls = defaultdict(float), defaultdict(int)
    for event in events:
        if event.get("ph") == "X" and on_device(event):
            total[event["name"]] += event.get("dur", 0.0)
            calls[event["name"]] += 1
    if not total:
        return []  # on a CPU there are none
    everything = sum(total.values())
    longest = sorted(total, key=lambda name: -total[name])
    rows = [
        {"name": name, "ms": total[name] / 1e3 / steps, "calls": calls[name] / steps, "share": total[name] / everything}
        for name in longest[:n]
    ]
    rest = [total[name] for name in longest[n:]]
    return [
        *rows,
        {
            "name": f"{len(rest)} others",
            "ms": sum(rest) / 1e3 / steps,
            "calls": sum(calls[name] for name in longest[n:]) / steps,
            "share": sum(rest) / everything,
        },
        {"name": "all", "ms": everything / 1e3 / steps, "calls": sum(calls.values()) / steps, "share": 1.0},
    ]
