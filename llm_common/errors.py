"""The one exception for what a user can get wrong; scripts print it as a single line and exit with 2."""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST_JSON = 256 << 20  # bytes; the largest tokenizer.json in use is some 35 MB


class UserError(ValueError):
    """A config, file, flag, text or device that cannot be used. The message names the value and the fix."""


def read_json(path: Path, hint: str = "") -> Any:
    """The contents of a JSON file. Raises UserError if it is missing, not a plain file, huge, or not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (f"; {hint}" if hint else ""))
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise UserError(f"{path}: {size:,} bytes of JSON; at most {LARGEST_JSON:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: cannot be read as JSON ({reason})") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or as it was before. Raises UserError if the disk is full or the place unusable."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or give another place") from None


def require_framework(name: str) -> None:
    """Raise UserError unless the packages behind `name` ("jax" or "torch") are installed."""
    for package in {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[name]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; run: pip install '.[{name}]'")


def require_package(package: str, extra: str) -> None:
    """Raise UserError unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install '.[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any framework says that memory ran out."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    return (
        bool(names & {"MemoryError", "OutOfMemoryError"})
        or "RESOURCE_EXHAUSTED" in text
        or "Out of memory" in text
        or "can't allocate memory" in text
    )


def import_side(framework: str, module: str):
    """The module `jax_llm.<module>` or `torch_llm.<module>`, after checking that its framework is installed."""
    if framework not in ("jax", "torch"):
        raise UserError(f"framework must be 'jax' or 'torch', got {framework!r}")
    require_framework(framework)
    return importlib.import_module(f"{framework}_llm.{module}")


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; a UserError, or a file that the system refuses, becomes one line on stderr and exit code 2,
    Ctrl-C exit code 130.
    """
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; give another path or make this one usable", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
