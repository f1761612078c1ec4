"""Text to train on: the documentation that ships with Python, or the user's own files."""

import ast
import codecs
import gzip
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from llm_common.errors import UserError
from llm_common.tokenizer import END_OF_TEXT

ENDINGS = (".txt", ".md", ".jsonl")


def python_documentation() -> Iterator[str]:
    """English prose that needs no download, one document each: Python's help topics and its library's docstrings.

    About 2 MB. The files are parsed, never imported; their order is that of their names, so the same Python version
    always gives the same corpus.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics_file = library / "pydoc_data" / "topics.py"
    if topics_file.is_file():
        tree = ast.parse(topics_file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
                yield node.value
    skipped = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "__pycache__", "lib2to3", "idlelib"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 100:
                yield text


class Corpus:
    """Text files to read from: UTF-8 text, JSONL of which one field is read, either of them compressed with gzip.

    paths: files, and folders of which all files ending in .txt, .md and .jsonl, or these and .gz, are read, in the order of
    their names; none: `python_documentation`. In a text file <|endoftext|> separates documents; in JSONL every line is one.
    replace_invalid: bytes that are not UTF-8 become U+FFFD. on_bytes(how many) is called as files are read.
    Raises UserError for what is missing, not permitted, empty or damaged; a damaged file names the byte or the line.
    """

    def __init__(
        self,
        paths: Sequence[Path | str] = (),
        field: str = "text",
        replace_invalid: bool = False,
        on_bytes: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.field, self.errors, self.on_bytes = field, "replace" if replace_invalid else "strict", on_bytes
        self.paths = [Path(path) for path in paths]
        self.files = [file for path in self.paths for file in _files(path)]
        self.size = sum(file.stat().st_size for file in self.files)  # bytes on disk

    def documents(self) -> Iterator[str]:
        """The documents, whole. White space alone is none."""
        if not self.paths:
            yield from python_documentation()
            return
        found = False
        for file in self.files:
            for document in self._json_lines(file) if _is_json(file) else _split(self._chunks(file)):
                if document.strip():
                    found = True
                    yield document
        self._check(found)

    def stretches(self) -> Iterator[Iterator[str]]:
        """What `documents` gives, in pieces: an iterator for every file or line, so that one of any size fits into memory."""
        if not self.paths:
            yield from (iter([text]) for text in python_documentation())
            return
        found = False
        for file in self.files:
            for pieces in ([text] for text in self._json_lines(file)) if _is_json(file) else [self._chunks(file)]:
                found = found or file.stat().st_size > 0
                yield iter(pieces)
        self._check(found)

    def _check(self, found: bool) -> None:
        if not found:
            names = ", ".join(map(str, self.paths))
            raise UserError(f"{names}: no text found (UTF-8 files, or folders with .txt, .md or .jsonl, also with .gz)")

    def _chunks(self, file: Path) -> Iterator[str]:
        """The text of a file in pieces, of which none ends within a character."""
        decoder, at = codecs.getincrementaldecoder("utf-8")(self.errors), 0
        for content in self._bytes(file):
            try:
                text = decoder.decode(content)
            except UnicodeDecodeError as error:
                raise self._not_utf8(file, at - len(decoder.getstate()[0]) + error.start) from None
            at += len(content)
            yield text
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self._not_utf8(file, at - len(error.object) + error.start) from None

    def _not_utf8(self, file: Path, position: int) -> UserError:
        where = " of its uncompressed content" if file.suffix == ".gz" else ""
        return UserError(f"{file}: not UTF-8 at byte {position}{where}; convert the file, or pass --replace-invalid")

    def _bytes(self, file: Path) -> Iterator[bytes]:
        """The content of a file, uncompressed, a megabyte at a time."""
        try:
            with open(file, "rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as content:
                before = 0
                while part := content.read(1 << 20):
                    now = raw.tell()
                    self.on_bytes(now - before)
                    before = now
                    yield part
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: damaged or cut off ({error}); fetch it again") from None
        except PermissionError:
            raise UserError(f"{file}: no permission to read it") from None

    def _json_lines(self, file: Path) -> Iterator[str]:
        for number, line in enumerate(_lines(self._chunks(file)), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not JSON ({error})") from None
            text = record.get(self.field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{file}, line {number}: no text in field {self.field!r} (found: {keys}); name it with --field"
                )
            yield text


def documents(path: Path | str | None = None) -> Iterator[str]:
    """The documents of a file or folder; None: `python_documentation`. Raises UserError as `Corpus` does."""
    return Corpus([] if path is None else [path]).documents()


def _files(path: Path) -> list[Path]:
    """A file, or the text files of a folder in the order of their names."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: no permission to look into this folder") from None

    found = []
    for folder, _, names in os.walk(path, onerror=refuse):
        found += [Path(folder) / name for name in names if Path(name.removesuffix(".gz")).suffix in ENDINGS]
    return sorted(file for file in found if file.is_file())


def _is_json(file: Path) -> bool:
    return Path(file.name.removesuffix(".gz")).suffix == ".jsonl"


def _split(chunks: Iterable[str]) -> Iterator[str]:
    """The documents between <|endoftext|>."""
    held: list[str] = []
    for chunk in chunks:
        # a separator may lie across the border of two chunks
        tail = held.pop() if held else ""
        first, *others = (tail + chunk).split(END_OF_TEXT)
        held.append(first)
        for text in others:
            yield "".join(held)
            held = [text]
        last = held.pop()
        keep = len(END_OF_TEXT) - 1
        held += [last[:-keep], last[-keep:]] if len(last) > keep else [last]
    yield "".join(held)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """The lines of a text, without their ends. Only a newline ends one: JSON may hold other separators."""
    held: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        held.append(first)
        for text in others:
            yield "".join(held)
            held = [text]
    yield "".join(held)
