"""Text to train on: the documentation that ships with Python, or the user's own files."""

import ast
import codecs
import gzip
import os
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_common.errors import UserError
from llm_common.text.records import csv_records, json_lines, json_values, looks_like_records
from llm_common.text.tokenizer import END_OF_TEXT, FILE_NAME
from llm_common.text.tokenizer_folder import FILES

TEXT, RECORDS = (".txt", ".md"), (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ENDINGS = (*TEXT, *RECORDS)
# What people have texts in that is not read, and how it becomes something that is.
OTHER_KINDS = {
    (".parquet", ".arrow", ".feather", ".orc", ".avro"): "a table; write its column of text as JSONL",
    (".zst", ".bz2", ".xz", ".lz4", ".br", ".z"): "compressed in a way that is not read; unpack it, or use gzip",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "an archive; unpack it, and give its folder",
    (
        ".pdf",
        ".doc",
        ".docx",
        ".odt",
        ".rtf",
        ".epub",
        ".mobi",
    ): "a document with a layout; extract its text to a .txt file",
    (".xls", ".xlsx", ".ods"): "a spreadsheet; save it as .csv",
    (".npy", ".npz"): "tokens or arrays already; training reads them with `data`",
    (".pkl", ".pickle", ".pt", ".pth", ".bin"): "binary, and a pickle can run code; write its text as JSONL",
    (".safetensors", ".gguf", ".onnx"): "the weights of a model, not text",
    (".db", ".sqlite", ".sqlite3"): "a database; write its text as JSONL",
}
OWN_FILES = {*FILES, FILE_NAME, "config.json", "manifest.json", "plan.json", "state.json", "log.jsonl"}
LARGEST_RATIO = 200  # of what a .gz unpacks to, to its own size; text reaches 20, and more than this is a bomb


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
    """Text files to read from: UTF-8 text; JSONL, JSON and CSV, one field of them; any of them compressed with
    gzip.

    paths: files, and folders of which all files with one of the `ENDINGS`, or these and .gz, are read, in the order of
    their names; none: `python_documentation`. In a text file <|endoftext|> separates documents; of the others every
    record is one. replace_invalid: bytes that are not UTF-8 become U+FFFD. as_text: every file is text, whatever its
    name and content are. on_bytes(how many) is called as files are read. Raises UserError for what is missing, not
    permitted, empty, damaged or of a kind that is not read; a damaged file names the byte or the record.
    """

    def __init__(
        self,
        paths: Sequence[Path | str] = (),
        field: str = "text",
        replace_invalid: bool = False,
        on_bytes: Callable[[int], None] = lambda n: None,
        as_text: bool = False,
    ) -> None:
        self.field, self.errors, self.on_bytes = field, "replace" if replace_invalid else "strict", on_bytes
        self.paths, self.as_text = [Path(path) for path in paths], as_text
        self.files = [file for path in self.paths for file in _files(path)]
        for file in self.files:
            if not as_text:
                self._check_kind(file)
        self.size = sum(file.stat().st_size for file in self.files)  # bytes on disk

    def documents(self) -> Iterator[str]:
        """The documents, whole. White space alone is none."""
        if not self.paths:
            yield from python_documentation()
            return
        found = False
        for file in self.files:
            for document in self._texts(file) if self._has_records(file) else _split(self._chunks(file)):
                if document.strip():
                    found = True
                    yield document
        self._check(found)

    def stretches(self) -> Iterator[Iterator[str]]:
        """What `documents` gives, in pieces: an iterator for every file or line, so that one of any size fits into
        memory.
        """
        if not self.paths:
            yield from (iter([text]) for text in python_documentation())
            return
        found = False
        for file in self.files:
            for pieces in ([text] for text in self._texts(file)) if self._has_records(file) else [self._chunks(file)]:
                found = found or file.stat().st_size > 0
                yield iter(pieces)
        self._check(found)

    def _check(self, found: bool) -> None:
        if not found:
            names = ", ".join(map(str, self.paths))
            raise UserError(
                f"{names}: no text found (UTF-8 files, or folders with {', '.join(ENDINGS)}, also with .gz)"
            )

    def _has_records(self, file: Path) -> bool:
        return not self.as_text and _ending(file) in RECORDS

    def _check_kind(self, file: Path) -> None:
        """Raise UserError for a file that would be read as what it is not."""
        ending = _ending(file)
        for endings, what in OTHER_KINDS.items():
            if ending in endings:
                raise UserError(f"{file}: {what}; or pass `as_text`")
        if ending not in RECORDS and (what := looks_like_records(self._head(file))):
            raise UserError(
                f"{file}: holds {what}, but its name does not end in {' or '.join(RECORDS[:3])}: rename it to read a "
                "field of each "
                "record, or pass `as_text` to learn it as it stands"
            )

    def _head(self, file: Path) -> str:
        """About the first 64k characters."""
        quiet, self.on_bytes = self.on_bytes, lambda n: None
        try:
            for content in self._bytes(file, 1 << 16):
                return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "ignore")
            return ""
        finally:
            self.on_bytes = quiet

    def _chunks(self, file: Path) -> Iterator[str]:
        """The text of a file in pieces; no piece ends within a character, and a byte order mark is no text."""
        decoder, at = codecs.getincrementaldecoder("utf-8")(self.errors), 0
        for content in self._bytes(file):
            if at == 0:
                for mark, name in (
                    (codecs.BOM_UTF32_LE, "UTF-32"),
                    (codecs.BOM_UTF32_BE, "UTF-32"),
                    (codecs.BOM_UTF16_LE, "UTF-16"),
                    (codecs.BOM_UTF16_BE, "UTF-16"),
                ):
                    if content.startswith(mark):
                        raise UserError(f"{file}: {name}, as its first bytes say; convert the file to UTF-8")
                at = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
                content = content[at:]
            if self.errors == "strict" and b"\0" in content:
                raise UserError(
                    f"{file}: not text: a NUL at byte {at + content.index(0)}; pass `replace_invalid` to read it anyway"
                )
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
        where = " of its uncompressed content" if file.suffix.lower() == ".gz" else ""
        return UserError(f"{file}: not UTF-8 at byte {position}{where}; convert the file, or pass `replace_invalid`")

    def _bytes(self, file: Path, size: int = 1 << 20) -> Iterator[bytes]:
        """The content of a file, uncompressed, a megabyte at a time."""
        try:
            with open(file, "rb") as raw, gzip.open(raw) if file.suffix.lower() == ".gz" else raw as content:
                before = unpacked = 0
                while part := content.read(size):
                    now = raw.tell()
                    self.on_bytes(now - before)
                    before, unpacked = now, unpacked + len(part)
                    if unpacked > max(LARGEST_RATIO * now, 64 << 20):
                        raise UserError(
                            f"{file}: unpacks to more than {LARGEST_RATIO} times its size, which no text does; not read"
                        )
                    yield part
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: damaged or cut off ({error}); fetch it again") from None
        except PermissionError:
            raise UserError(f"{file}: no permission to read it") from None

    def records(self, file: Path) -> Iterator[tuple[str, Any]]:
        """The records of a JSONL, JSON or CSV file, each after its place, for people."""
        ending, chunks = _ending(file), self._chunks(file)
        if ending in (".csv", ".tsv"):
            return csv_records(file, chunks, "\t" if ending == ".tsv" else ",", self.field)
        return json_values(file, chunks) if ending == ".json" else json_lines(file, chunks)

    def _texts(self, file: Path) -> Iterator[str]:
        for where, record in self.records(file):
            text = record.get(self.field) if isinstance(record, dict) else record
            if not isinstance(text, str):
                if isinstance(record, dict) and self.field in record:
                    kind = type(record[self.field]).__name__
                    raise UserError(f"{where}: field {self.field!r} holds no text but a value of kind {kind}")
                keys = ", ".join(map(str, record))[:300] if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where}: no text in field {self.field!r} (found: {keys}); name it with `field`")
            yield text


def read_records(path: Path, field: str = "") -> Iterator[tuple[str, Any]]:
    """The records of one JSONL, JSON or CSV file, also with .gz, each after its place, for people.

    field: one of a table's names, by which its delimiter is known. Raises UserError as `Corpus` does.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if _ending(path) not in RECORDS:
        raise UserError(f"{path}: records are read from {', '.join(RECORDS)}, each also with .gz")
    return Corpus([path], field).records(path)


def documents(path: Path | str | None = None) -> Iterator[str]:
    """The documents of a file or folder; None: `python_documentation`. Raises UserError as `Corpus` does."""
    return Corpus([] if path is None else [path]).documents()


def _files(path: Path) -> list[Path]:
    """A file, or the text files of a folder in the order of their names."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: a pipe or a device, which is not read; write it to a file first")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: no permission to look into this folder") from None

    found, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(here)
        found += [Path(folder) / name for name in names if _ending(Path(name)) in ENDINGS and not _is_ours(name)]
    return sorted(file for file in found if file.is_file())


def _is_ours(name: str) -> bool:
    """Whether a file is one that this program or a model keeps beside text, or hidden."""
    return name.startswith(".") or name in OWN_FILES or name.endswith((".npy.json", ".npz.json", ".index.json"))


def _ending(file: Path) -> str:
    """The ending of a file's name, in small letters, before a .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


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
