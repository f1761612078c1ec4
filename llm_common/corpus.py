"""Text to train on: the documentation that ships with Python, or the user's own files."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llm_common.errors import UserError
from llm_common.tokenizer import END_OF_TEXT


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


def documents(path: Path | str | None = None) -> Iterator[str]:
    """Documents of a UTF-8 file or of a folder's .txt and .md files; None: `python_documentation`.

    Inside a file <|endoftext|> separates documents. Raises UserError for a missing, empty or undecodable file.
    """
    if path is None:
        yield from python_documentation()
        return
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    )
    found = False
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
        for document in text.split(END_OF_TEXT):
            if document.strip():
                found = True
                yield document
    if not found:
        raise UserError(f"{path}: no text found (a UTF-8 file, or a folder with .txt or .md files)")
