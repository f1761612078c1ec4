"""A run's log: JSON lines, the first of which says on what the run was made."""

import importlib.metadata
import json
import math
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

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
        "python": sys.version.split()[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "versions": versions,
    }


class RunLog:
    """Appends one JSON object a line (a number that is not finite as null); every line is flushed, so that a killed run loses none.

    The file is opened, and the header written, with the first row: a run that is refused leaves no trace.
    """

    def __init__(self, path: Path | str, **header: Any) -> None:
        self.path, self._header = Path(path), header
        self._file: TextIO | None = None

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            now = datetime.now(UTC).isoformat()
            self.write({"event": "start", "time": now, **environment(), **self._header})
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_log(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
