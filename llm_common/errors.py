"""The one exception for what a user can get wrong; scripts print it as a single line and exit with 2."""

import contextlib
import difflib
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 << 20  # bytes; the largest tokenizer.json in use is some 35 MB
# Objects and arrays of a JSON file: an empty one takes 20 to 30 times its characters in memory. The largest
# tokenizer.json in use has half a million, one for each merge.
MOST_CONTAINERS = 4 << 20
SAID: list[str] = []  # notices of this process: those that it begins need not say them again


class UserError(ValueError):
    """A config, file, flag, text or device that cannot be used. The message names the value and the fix.

    A field or parameter that the fix is about stands in backquotes; programs print the flag of that name.
    """


class Damaged(UserError):
    """A file of this program's own that is not as it was written. What was saved before it is still there."""


def notice(text: str) -> None:
    """Tell the person at the terminal what was decided for them, without touching what a program prints for others to
    read.
    """
    line = f"note: {in_flags(text)}"
    SAID.append(line)
    print(line, file=sys.stderr)


def nearest(given: str, known: Iterable[str]) -> str:
    """The nearest known name, as a question, or nothing where none is near."""
    names = {name.lstrip("-"): name for name in known}
    asked = given.lstrip("-")
    longer = [name for name in names if name.startswith((f"{asked}-", f"{asked}_"))]
    near = longer[:1] or difflib.get_close_matches(asked, list(names), n=1, cutoff=0.7)
    return f": did you mean {names[near[0]]}?" if near and asked else ""


def counted(n: int, thing: str) -> str:
    """A number of things, as "1 step" and "2,000 steps"."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def in_flags(message: str) -> str:
    """A message for a person at a command line: `some_field` becomes --some-field, and so does a config's own field
    with its value.
    """
    message = re.sub(
        r"\b(?:Train|Optimizer|Execution|Run|Sampling)Config\.([a-z][a-z0-9_]*) = (.*?): ",
        lambda match: f"--{match[1].replace('_', '-')} {match[2]}: ",
        message,
    )
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda match: "--" + match[1].replace("_", "-"), message)


def read_json(path: Path, hint: str = "") -> Any:
    """The contents of a JSON file. Raises UserError if it is missing, not a plain file, huge, or not JSON."""
    return parse_json(read_small(path, hint), str(path))


def read_small(path: Path, hint: str = "", most: int = LARGEST_JSON) -> bytes:
    """The bytes of a file that is read whole. Raises UserError if it is missing, not a plain file, or of more than
    `most` bytes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (f"; {hint}" if hint else ""))
    size = path.stat().st_size
    if size > most:
        raise UserError(f"{path}: {size:,} bytes; at most {most:,} are read")
    return path.read_bytes()


def parse_json(content: bytes, where: str, **options: Any) -> Any:
    """JSON of a stranger, UTF-8 with or without a byte order mark: bounded in memory, any depth refused by name.

    options: for `json.loads`. Raises UserError, which begins with `where`.
    """
    if content.count(b"[") + content.count(b"{") > MOST_CONTAINERS:
        raise UserError(f"{where}: more than {MOST_CONTAINERS:,} objects and arrays; so many are not read")
    try:
        return json.loads(content.decode("utf-8-sig"), **options)
    except UserError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: cannot be read as JSON ({reason})") from None


def json_bytes(content: Any) -> bytes:
    """A JSON file for people."""
    return (json.dumps(content, indent=2) + "\n").encode()


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(content: Any) -> bytes:
    """The one form of some JSON, for a hash of it: keys sorted, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """An object with the sha256 of its other fields under "checksum"."""
    content = json.loads(canonical_json({key: x for key, x in content.items() if key != "checksum"}))
    return {**content, "checksum": hashlib.sha256(canonical_json(content)).hexdigest()}


def has_its_checksum(content: dict[str, Any]) -> bool:
    """Whether an object's "checksum" is that of its other fields."""
    try:
        return with_checksum(content)["checksum"] == content.get("checksum")
    except (ValueError, TypeError, RecursionError):  # a number that is not finite has no canonical form
        return False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or as it was before. Raises UserError if the disk is full or the place
    unusable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _remove_leftovers(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or give another place") from None


def _remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed had begun to write in the place of a file, once it is ten minutes old."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError):
            if left.suffix[1:].isdigit() and time.time() - left.stat().st_mtime > 600:
                left.unlink()


def first_line(error: Exception) -> str:
    """What an exception of a library says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def require_framework(name: str) -> None:
    """Raise UserError unless the packages behind `name` ("jax" or "torch") are installed."""
    for package in {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[name]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; run: pip install {_requirements(name)}")


def require_package(package: str, extra: str) -> None:
    """Raise UserError unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install {_requirements(extra, package)}")


def _requirements(extra: str, package: str | None = None) -> str:
    """What pip is asked for: the versions that this package's own extra names, of all its packages or of one. It works
    wherever the package came from: a checkout, a wheel or an index.
    """
    try:
        listed = importlib.metadata.requires("one-model-twice") or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    of_extra = [x.partition(";")[0].strip() for x in listed if re.search(rf"extra == ['\"]{extra}['\"]", x)]
    found = [x for x in of_extra if package is None or re.match(rf"{re.escape(package)}\b", x)]
    found = [x for x in found if not x.startswith("one-model-twice")] or [package or extra]
    return " ".join(f"'{x}'" if re.search(r"[<>=\[]", x) else x for x in found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any framework says that memory ran out."""
    names = {cls.__name__.lstrip("_") for cls in type(error).__mro__}
    text = str(error)
    return (
        bool(names & {"MemoryError", "OutOfMemoryError"})
        or "RESOURCE_EXHAUSTED" in text
        or "Out of memory" in text
        or "can't allocate memory" in text
    )


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; a UserError, or a file that the system refuses, becomes one line on stderr and exit code
    2, Ctrl-C exit code 130.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began this program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to end
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read what is printed has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        print(f"error: {in_flags(str(error))}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: memory ran out on the host: {first_line(error)}; ask for less at once", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = "what is printed" if error.filename is None else error.filename
        print(f"error: {where}: {error.strerror}; give another path or make this one usable", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
