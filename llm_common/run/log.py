"""A run's log: JSON lines. The first says on what the run was made."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TextIO

from llm_common.errors import UserError

PACKAGES = ("numpy", "jax", "jaxlib", "flax", "optax", "torch", "safetensors", "regex")


def environment() -> dict[str, Any]:
    """Python, operating system, processor and the versions of the packages that decide numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": date.today().isoformat(),
        "python": sys.version.split()[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "versions": versions,
    }


class RunLog:
    """Appends one JSON object a line (a number that is not finite as null); every line is flushed, so that a killed run
    loses none.

    The file is opened, and the header written, with the first row: a run that is refused leaves no trace. A run that
    goes on after `step` steps drops the rows of later ones, which it will make again: every step is there exactly once.
    """

    def __init__(self, path: Path | str, step: int = 0, **header: Any) -> None:
        self.path, self.step, self._header = Path(path), step, header
        self._file: TextIO | None = None

    def write(self, row: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._drop_later_rows()
                self._file = self.path.open("a", encoding="utf-8")
                now = datetime.now(UTC).isoformat()
                self.write({"event": "start", "step": self.step, "time": now, **environment(), **self._header})
            row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); the last checkpoint is complete"
            ) from None

    def _drop_later_rows(self) -> None:
        if not self.path.exists():
            return
        if self.step == 0 and b'"loss"' in self.path.read_bytes():  # of a run without a checkpoint, or of another one
            other = next(
                x for i in itertools.count(1) if not (x := self.path.with_name(f"{self.path.name}.before-{i}")).exists()
            )
            self.path.rename(other)
            return
        place = lambda row: row.get("step") if isinstance(row.get("step"), int) else 0
        rows = [] if self.step == 0 else [row for row in read_log(self.path) if place(row) <= self.step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, self.path)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: `write` has said so
                self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a killed run did not finish is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise UserError(f"{path}, line {i + 1}: not JSON; is this the log of a run?") from None
    return [row for row in rows if isinstance(row, dict)]


class TensorBoard:
    """Scalars for TensorBoard, if the package `tensorboard` is installed; otherwise nothing."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore

            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
