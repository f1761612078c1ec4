"""Records out of the text of a JSONL, JSON or CSV file, one at a time and each of a bounded size."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm_common.errors import MOST_CONTAINERS, UserError

LARGEST_RECORD = 64 << 20  # characters of one line or record


def json_lines(file: Path, chunks: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines_of(chunks, file), 1):
        if line.strip():
            yield f"{file}, line {number}", _parse(f"{file}, line {number}", line)


def _check_containers(where: str, text: str) -> None:
    if len(text) > MOST_CONTAINERS and text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise UserError(f"{where}: more than {MOST_CONTAINERS:,} objects and arrays; so many are not read")


def _parse(where: str, text: str) -> Any:
    _check_containers(where, text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: not JSON ({reason})") from None


def json_values(file: Path, chunks: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The elements of an array, or the values that stand one after the other; in memory is one of them."""
    decoder, chunks, text, at, number, inside = json.JSONDecoder(), iter(chunks), "", 0, 0, None

    def more() -> bool:
        """Read on; whether there was anything. A record that is not whole yet is parsed again: twice as much is read
        each time.
        """
        nonlocal text, at
        parts, size = [text[at:]], 0
        while (part := next(chunks, None)) is not None:
            parts.append(part)
            size += len(part)
            if size >= len(parts[0]):
                break
        text, at = "".join(parts), 0
        return size > 0

    while True:
        while at < len(text) and text[at] in " \t\r\n" + ("," if inside and number else ""):
            at += 1
        if at == len(text):
            if not more():
                break
            continue
        if inside is None:
            inside = text[at] == "["
            at += inside
            continue
        if inside and text[at] == "]":
            inside, at = False, at + 1
            continue
        where = f"{file}, record {number + 1}"
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            raise UserError(f"{where}: not JSON (nested too deeply)") from None
        except ValueError as error:
            if len(text) - at > LARGEST_RECORD:
                raise UserError(f"{where}: more than {LARGEST_RECORD:,} characters, or not JSON ({error})") from None
            if more():
                _check_containers(where, text)
                continue
            raise UserError(f"{where}: not JSON ({error})") from None
        at, number = end, number + 1
        yield where, value
    if inside:
        raise UserError(f"{file}: cut off: its array does not end; fetch it again")


def csv_records(file: Path, chunks: Iterable[str], delimiter: str, field: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each with the names of the first one."""
    csv.field_size_limit(LARGEST_RECORD)
    lines = (line + "\n" for line in lines_of(chunks, file))
    first = next(lines, "")
    try:
        others = [x for x in (delimiter, ";", "\t", "|") if field in next(csv.reader([first], delimiter=x), [])]
    except csv.Error as error:
        raise UserError(f"{file}, line 1: not CSV ({error})") from None
    rows = csv.reader(itertools.chain([first], lines), delimiter=(others or [delimiter])[0], strict=True)
    try:
        names = next(rows, [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{file}: two columns are named {twice[0]!r}; give one of them another name")
        for row in rows:
            if len(row) > len(names):
                raise UserError(
                    f"{file}, line {rows.line_num}: {len(row)} fields, but the first line names {len(names)}; text "
                    "with the "
                    "delimiter in it needs quotes around it"
                )
            if row:
                yield f"{file}, line {rows.line_num}", dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def looks_like_records(text: str) -> str | None:
    """What the beginning of a file is, if it is JSON."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return None
    lines = [line for line in start.split("\n")[:3] if line.strip()]
    try:
        values = [json.loads(line) for line in (lines[:2] if len(lines) > 1 else lines)]
        if all(isinstance(x, dict) and x for x in values):
            return "JSON records"
    except (ValueError, RecursionError):
        pass
    try:
        value, _ = json.JSONDecoder().raw_decode(start[1:].lstrip() if start[0] == "[" else start)
        return "JSON" if isinstance(value, dict) and value else None
    except (ValueError, RecursionError):
        return None


def lines_of(chunks: Iterable[str], file: Path | str = "text") -> Iterator[str]:
    """The lines of a text, without their ends. Only a newline ends one: JSON may hold other separators."""
    held: list[str] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split("\n")
        held.append(first)
        size += len(first)
        for text in others:
            yield "".join(held)
            held, size = [text], len(text)
        if size > LARGEST_RECORD:
            raise UserError(f"{file}: a line of more than {LARGEST_RECORD:,} characters; is it what its name says?")
    yield "".join(held)
