"""Planting a bug: a syntax-tree node of a named function is replaced by another, in memory.

The function keeps its identity and gets new code, so everybody who imported it runs the bug. Text and line numbers play
no part; a node that is not there, or is there twice, is an error: a catalogue of bugs must not silently test nothing.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PACKAGES = ("llm_common", "jax_llm", "torch_llm", "parity")


class AnchorError(Exception):
    """A planted bug does not fit the code any more."""


@dataclass(frozen=True)
class Edit:
    """In the function `target` ("package.module:Class.name"), the node that reads `old` becomes `new`.

    `old` and `new` are Python source, an expression or some statements in a row; an `old` of "..." is the whole body. A
    target that is a constant of a module takes the value of the expression `new`, wherever it was imported to.
    """

    target: str
    old: str
    new: str


@contextlib.contextmanager
def planted(edits: Sequence[Edit]) -> Iterator[None]:
    """While this is open the bug is there. Raises AnchorError if an edit does not fit."""
    with contextlib.ExitStack() as stack:
        for target in dict.fromkeys(edit.target for edit in edits):
            mine = [edit for edit in edits if edit.target == target]
            stack.enter_context(_planted_in(target, mine))
        yield


@contextlib.contextmanager
def _planted_in(target: str, edits: Sequence[Edit]) -> Iterator[None]:
    value = _find(target)
    function = inspect.unwrap(value) if callable(value) else value
    if not inspect.isfunction(function):
        yield from _replaced_constant(value, edits[0])
        return
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    mutant = _compile(function, edits)
    try:
        function.__code__ = mutant.__code__
        function.__defaults__, function.__kwdefaults__ = mutant.__defaults__, mutant.__kwdefaults__
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = before


def _find(target: str) -> Any:
    module, _, path = target.partition(":")
    try:
        parts = path.split(".")
        value = importlib.import_module(module)
        for part in parts[:-1]:
            value = getattr(value, part)
        # a method as it is written, not bound
        return inspect.getattr_static(value, parts[-1]) if inspect.isclass(value) else getattr(value, parts[-1])
    except (ImportError, AttributeError):
        raise AnchorError(f"{target}: there is no such function any more") from None


def _replaced_constant(value: Any, edit: Edit) -> Iterator[None]:
    name = edit.target.rpartition(":")[2]
    new = eval(edit.new, {"old": value})
    holders = [
        module
        for key, module in list(sys.modules.items())
        if key.split(".")[0] in PACKAGES and getattr(module, name, None) is value
    ]
    try:
        for module in holders:
            setattr(module, name, new)
        yield
    finally:
        for module in holders:
            setattr(module, name, value)


@functools.cache
def _source(function: Any) -> str:
    return textwrap.dedent(inspect.getsource(function))


def _compile(function: Any, edits: Sequence[Edit]) -> Any:
    """The function with its nodes replaced, compiled in its own module's names."""
    definition = ast.parse(_source(function)).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for edit in edits:
        _replace(definition, edit)
    free = function.__code__.co_freevars
    body: list[ast.stmt] = [definition]
    if free:  # methods with super() refer to their class through a cell; a function around ours provides one
        arguments = ast.arguments(
            posonlyargs=[], args=[ast.arg(name) for name in free], kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        result = ast.Return(ast.Name(definition.name, ast.Load()))
        body = [ast.FunctionDef("_outer", arguments, [definition, result], [])]
    tree = ast.fix_missing_locations(ast.Module(body, []))
    names: dict[str, Any] = {}
    exec(
        compile(tree, function.__code__.co_filename, "exec"),
        function.__globals__ | {"__name__": function.__module__},
        names,
    )
    mutant = names["_outer"](*free) if free else names[definition.name]
    if mutant.__code__.co_freevars != free:
        raise AnchorError(f"{edits[0].target}: the new code has other outer names {mutant.__code__.co_freevars}")
    return mutant


def _replace(definition: ast.FunctionDef, edit: Edit) -> None:
    new = ast.parse(textwrap.dedent(edit.new)).body
    if edit.old == "...":
        definition.body = new
        return
    old = ast.parse(textwrap.dedent(edit.old)).body
    if len(old) == 1 and isinstance(old[0], ast.Expr) and len(new) == 1 and isinstance(new[0], ast.Expr):
        finder = _Expression(ast.dump(old[0].value), new[0].value)
        finder.visit(definition)
        found = finder.found
    else:
        found = _replace_statements(definition, [ast.dump(x) for x in old], new)
    if found != 1:
        raise AnchorError(f"{edit.target}: {edit.old!r} is there {found} times, not once")


class _Expression(ast.NodeTransformer):
    def __init__(self, old: str, new: ast.expr) -> None:
        self.old, self.new, self.found = old, new, 0

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and ast.dump(node) == self.old:
            self.found += 1
            return self.new
        return self.generic_visit(node)


def _replace_statements(definition: ast.FunctionDef, old: list[str], new: list[ast.stmt]) -> int:
    found = 0
    for node in ast.walk(definition):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            dumps = [ast.dump(x) for x in block]
            for i in range(len(block) - len(old) + 1):
                if dumps[i : i + len(old)] == old:
                    found += 1
                    block[i : i + len(old)] = new
                    break
    return found
