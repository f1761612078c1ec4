"""What a person sees of a run: a line every few steps, a bar on a terminal, and a summary at the end."""

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llm_common.errors import counted
from llm_common.run.estimates import GIB


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Heartbeat:
    """Says on stderr what a program is doing when it has said nothing for a while; to be used as a context manager.

    what: said after `every` seconds (None: those of ONE_MODEL_HEARTBEAT, 8), and again as often, with the seconds since
    it began; `says` begins another one, or only tells that something was printed. quiet: nothing is ever said.
    """

    def __init__(self, what: str, every: float | None = None, quiet: bool = False) -> None:
        self.what, self.every = what, every or float(os.environ.get("ONE_MODEL_HEARTBEAT", "8"))
        self._began = self._said = time.monotonic()
        self._quiet, self._end = quiet, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if not self._quiet:
            self._thread.join()

    def says(self, what: str | None = None) -> None:
        """Something was printed, or something else is done from now on."""
        self._said = time.monotonic()
        if what is not None and what != self.what:
            self.what, self._began = what, self._said

    def _beat(self) -> None:
        while not self._end.wait(min(1.0, self.every / 4)):
            now = time.monotonic()
            if now - self._said >= self.every:
                self._said = now
                print(f"{self.what} ({duration(now - self._began)})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line every few seconds on stderr elsewhere; `show(text, done, total)` moves it."""
    if not console.is_terminal:
        with Heartbeat("starting") as heart:

            def show(text: str, done: int, total: int) -> None:
                heart.what = f"{text}: {100 * done / max(total, 1):.0f} %"

            yield show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


class TrainingProgress:
    """Prints the rows of a run's log as they come; to be used as a context manager.

    flops_per_token and peak_flops: for the share of the device's peak (MFU); peak None: not shown. memory: gives the
    bytes in use.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        memory,
    ) -> None:
        self.console, self.total_steps, self.log_every = console, total_steps, log_every
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.memory = memory
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.skipped = 0
        self._window: list[float] = []  # seconds of the steps since the last line
        self._steps = 0
        self._began = time.monotonic()
        self._heart = Heartbeat("compiling the first step", quiet=console.quiet)
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total_steps, text="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        self._heart.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._heart.__exit__()
        self._bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        event = row.get("event")
        if event is None:
            self._step(row)
            return
        self._heart.says()
        if event == "resume":
            self.console.print(f"going on from {row['checkpoint']}, after step {row['step']}", markup=False)
            self._bar.update(self._task, completed=row["step"])
        elif event == "extend":
            self.console.print(
                f"extended from {row['from']} to {row['total_steps']} steps: the learning rate follows the new total "
                "from step "
                f"{row['step']} on, the moments are kept"
            )
        elif event == "evaluation":
            self.evaluations.append(row)
            bits = f"  {row['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in row else ""
            self.console.print(
                f"step {row['step']}  held-out loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}{bits}  "
                f"({counted(row['tokens'], 'token')})"
            )
        elif event == "save":
            self.console.print(f"step {row['step']}  saved {row['checkpoint']}", markup=False)

    def _step(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._heart.what = f"step {step}/{self.total_steps}  loss {row['loss']:.4f}"
        self.losses.append(row["loss"])
        self.skipped += bool(row["skipped"])
        self._steps += 1
        if self._steps > 1:  # the first step of a process compiles
            self._window.append(self.tokens_per_step / max(row["tokens_per_second"], 1e-9))
        if step % self.log_every and step != self.total_steps and self._steps > 1:
            self._bar.update(self._task, completed=step)
            return
        parts = [
            f"step {step}/{self.total_steps}",
            f"loss {row['loss']:.4f}",
            f"norm {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
        ]
        text = ""
        if self._window:
            seconds = statistics.fmean(self._window)
            rate = self.tokens_per_step / seconds
            self.rates.append(rate)
            self._window.clear()
            left = duration((self.total_steps - step) * seconds)
            parts += [f"{rate:,.0f} tokens/s", f"left {left}", f"memory {self.memory() / GIB:.2f} GiB"]
            if self.peak_flops is not None:
                parts.append(f"MFU {100 * rate * self.flops_per_token / self.peak_flops:.1f} %")
            text = f"loss {row['loss']:.3f}  left {left}"
        if row["skipped"]:
            parts.append("update skipped: the gradient norm is not finite")
        self.console.print("  ".join(parts))
        self._heart.says()
        self._bar.update(self._task, completed=step, text=text)

    def summary(self, folder, log) -> None:
        """A table of the run's end; nothing if it made no step."""
        if not self.losses:
            return
        tail = self.losses[-10:]
        table = Table(show_header=False, box=None, pad_edge=False)
        rows = [
            (
                "steps",
                f"{len(self.losses)} now" + (f", {self.skipped} of them without an update" if self.skipped else ""),
            ),
            ("loss", f"{self.losses[-1]:.4f} (mean of the last {len(tail)}: {statistics.fmean(tail):.4f})"),
        ]
        if self.evaluations:
            last, best = self.evaluations[-1], min(self.evaluations, key=lambda row: row["loss"])
            rows.append(("held-out loss", f"{last['loss']:.4f}, best {best['loss']:.4f} at step {best['step']}"))
            if "bits_per_byte" in last:
                rows.append(("bits per byte", f"{last['bits_per_byte']:.4f}, best {best['bits_per_byte']:.4f}"))
        if self.rates:
            rows.append(("speed", f"{statistics.median(self.rates):,.0f} tokens/s (median), the first step apart"))
        rows += [
            ("time", duration(time.monotonic() - self._began)),
            ("memory", f"{self.memory() / GIB:.2f} GiB at most"),
            ("checkpoint", str(folder)),
            ("log", str(log)),
        ]
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
