"""Mutation operators: from the source of a file, every small edit that a slip could make of it.

An edit replaces one span of the text, so what is planted can be read and repeated. Left alone: docstrings, annotations,
imports, assertions, what is said to people, and refusals of bad input (a `raise`, the `if` that does nothing else, a
call of `check_...`), which decide no number.
"""

import ast
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {  # how it is written, and what it becomes
    ast.Lt: ("<", "<=", ">"),
    ast.LtE: ("<=", "<", ">="),
    ast.Gt: (">", ">=", "<"),
    ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {  # how it is written, and what it becomes
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
DTYPES = {
    "float64": "float32",
    "float32": "bfloat16",
    "bfloat16": "float32",
    "int64": "int32",
    "uint64": "uint32",
    "uint32": "uint16",
    "int32": "int16",
}
CASTS = ("astype", "to", "float", "upcast", "type_as")  # methods and functions that give their argument another dtype
# calls that tell people something, and decide no number
QUIET = ("print", "warn", "warnings", "notice", "note", "info", "tell", "show", "report", "filterwarnings", "progress")
COMMUTATIVE = ("min", "max", "minimum", "maximum", "array_equal")
AXES = ("axis", "dim", "axes", "dims")
# names that a slip confuses: one for the other, as whole words between underscores
TWINS = (
    ("q", "k"),
    ("k", "v"),
    ("query", "key"),
    ("key", "value"),
    ("queries", "keys"),
    ("keys", "values"),
    ("cos", "sin"),
    ("gate", "up"),
    ("input", "output"),
    ("inputs", "targets"),
    ("mu", "nu"),
    ("m", "v"),
    ("beta1", "beta2"),
    ("min", "max"),
    ("first", "last"),
    ("old", "new"),
    ("before", "after"),
    ("start", "end"),
    ("start", "stop"),
    ("left", "right"),
    ("low", "high"),
    ("rows", "columns"),
    ("row", "column"),
    ("batch", "length"),
    ("data", "fsdp"),
    ("fsdp", "tensor"),
    ("step", "count"),
    ("steps", "updates"),
    ("hidden_size", "intermediate_size"),
    ("num_attention_heads", "num_key_value_heads"),
    ("attention", "key_value"),
    ("bos", "eos"),
    ("prompt", "answer"),
    ("tokens", "bytes"),
    ("chars", "bytes"),
    ("sum", "mean"),
    ("weight", "bias"),
    ("a", "b"),
    ("i", "j"),
    ("n", "k"),
    ("x", "h"),
)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One edit of one file."""

    file: str  # from the root of the repository
    function: str  # dotted, empty outside functions
    operator: str
    line: int  # 1 is the first
    start: int  # bytes of the UTF-8 text
    end: int
    old: str
    new: str
    name: str  # eight hex digits that stay while the edited line does

    def apply(self, source: str) -> str:
        text = source.encode()
        if text[self.start : self.end].decode() != self.old:
            raise ValueError(f"{self.file}, line {self.line}: {self.old!r} is not there any more")
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()

    def __str__(self) -> str:
        return described(self)


def described(one: Any) -> str:
    """A line for people, of a mutation or of its outcome."""
    short = lambda text: " ".join(text.split())[:80]
    return f"{one.name} {one.file}:{one.line} {one.operator}: {short(one.old)!r} -> {short(one.new)!r}"


def mutations(file: str, source: str, defaults: dict[str, Any] | None = None) -> list[Mutation]:
    """All edits of a file in the order of the text. defaults: field of a config -> the value it has if nothing is
    said.
    """
    finder = _Finder(file, source, defaults or {})
    tree = ast.parse(source)
    finder.visit(tree)
    text, found, seen = source.encode(), [], set()
    # an edit lies within one statement of the module, which is parsed again by itself
    whole = [(finder.start(x), finder.end(x), ast.dump(ast.parse(finder.text(x)))) for x in tree.body]
    for one in sorted(finder.found, key=lambda m: (m.start, m.end, m.operator, m.new)):
        span = (one.start, one.end, one.new)
        if span in seen:
            continue
        seen.add(span)
        start, end, original = next(x for x in whole if x[0] <= one.start and one.end <= x[1])
        changed = text[start : one.start] + one.new.encode() + text[one.end : end]
        with contextlib.suppress(SyntaxError):
            if ast.dump(ast.parse(changed)) != original:
                found.append(one)
    return found


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: str, defaults: dict[str, Any]) -> None:
        self.file, self.source, self.defaults = file, source.encode(), defaults
        self.lines = [0]
        for line in source.encode().splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.names: list[str] = []  # of the classes and functions around
        self.functions = 0  # how many of these are functions
        self.bound: list[set[str]] = [set()]  # names that each function around binds
        self.found: list[Mutation] = []
        self.counts: dict[tuple[str, ...], int] = {}

    # --- spans

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def add(self, operator: str, start: int, end: int, new: str) -> None:
        old = self.source[start:end].decode()
        line = self.source[:start].count(b"\n")
        around = self.source[self.lines[line] : self.lines[line + 1]].decode().strip()
        function = ".".join(self.names)
        key = (self.file, function, operator, around, old, new)
        self.counts[key] = self.counts.get(key, 0) + 1
        name = hashlib.sha256("\0".join((*key, str(self.counts[key]))).encode()).hexdigest()[:8]
        self.found.append(Mutation(self.file, function, operator, line + 1, start, end, old, new, name))

    def replace(self, operator: str, node: ast.expr | ast.stmt, new: str) -> None:
        self.add(operator, self.start(node), self.end(node), new)

    def between(self, operator: str, left: ast.expr, right: ast.expr, written: str, new: str) -> None:
        """The operator that stands between two operands, brackets and spaces around it left as they are."""
        begin, text = self.end(left), self.source[self.end(left) : self.start(right)].decode()
        match = re.search(r"(?<![\w*/<>])" + re.escape(written) + r"(?![\w*/])", re.sub(r"#.*", _blank, text))
        if match:
            offset = len(text[: match.start()].encode())
            self.add(operator, begin + offset, begin + offset + len(written), new)

    # --- where nothing is planted

    def visit_Module(self, node: ast.Module) -> None:
        self.block(node.body)

    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...
    def visit_Assert(self, node: ast.Assert) -> None: ...
    def visit_Raise(self, node: ast.Raise) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self.bound.append(set())
        self.block(node.body)
        self.bound.pop()
        self.names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.name in ("__repr__", "__str__", "__post_init__"):  # for people; refusals
            return
        self.names.append(node.name)
        stored = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        self.bound.append({x.arg for x in arguments} | stored)
        self.functions += 1
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.block(node.body)
        self.functions -= 1
        self.bound.pop()
        self.names.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.bound.append({x.arg for x in node.args.args})
        self.visit(node.body)
        self.bound.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def block(self, body: list[ast.stmt]) -> None:
        assigned: set[str] = set(self.bound[-1]) if self.functions else set()
        for i, statement in enumerate(body):
            if i == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # the docstring
            if (isinstance(statement, ast.If) and _refuses(statement)) or _is_quiet(statement):
                continue
            if self.functions and _can_go(statement, assigned):
                self.replace("statement deleted", statement, "pass")
            self.visit(statement)

    # --- statements

    def visit_If(self, node: ast.If) -> None:
        self.condition(node.test)
        self.visit(node.test)
        self.block(node.body)
        self.block(node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.block(node.body)
        self.block(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.block(node.body)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self.block(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        for block in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            self.block(block)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            written, new = ARITHMETIC[type(node.op)]
            begin = self.end(node.target)
            at = self.source.find(written.encode() + b"=", begin, self.start(node.value))
            if at >= 0:
                self.add("arithmetic", at, at + len(written), new)
                self.add("arithmetic", at, at + len(written), "")
        self.visit(node.value)

    # --- expressions

    def condition(self, test: ast.expr) -> None:
        text = self.text(test)
        new = text[4:] if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else f"not ({text})"
        self.replace("condition negated", test, new)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        written, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            text = self.source[self.end(left) : self.start(right)].decode()
            match = re.search(rf"\b{written}\b", text)
            if match:
                at = self.end(left) + len(text[: match.start()].encode())
                self.add("condition negated", at, at + len(written), new)
            self.add("statement deleted", self.end(left), self.end(right), "")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            written, *others = COMPARISONS[type(op)]
            for new in others:
                self.between("comparison", left, right, written, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
            self.between("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace("arithmetic", node, self.text(node.operand))
        if isinstance(node.op, ast.Invert):
            self.replace("condition negated", node, self.text(node.operand))
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            if isinstance(value, int):
                self.replace("off by one", node, str(-value + 1))
                self.replace("off by one", node, str(-value - 1))
            return
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", node, str(not value))
        elif isinstance(value, int):
            self.replace("off by one", node, str(value + 1))
            if value > 0:
                self.replace("off by one", node, str(value - 1))
        elif isinstance(value, float):
            self.replace("constant", node, repr(value * 2) if value else "1.0")
        elif isinstance(value, str) and value in DTYPES:
            self.replace("dtype", node, f'"{DTYPES[value]}"')

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in DTYPES:
            self.replace("dtype", node, f"{self.text(node.value)}.{DTYPES[node.attr]}")
        if node.attr in self.defaults and isinstance(node.ctx, ast.Load) and self.functions:
            self.replace("default used", node, repr(self.defaults[node.attr]))
        if isinstance(node.ctx, ast.Load):
            for twin in _twins(node.attr):
                if re.search(rf"\b{twin}\b", self.source.decode()):
                    self.replace("wrong twin variable", node, f"{self.text(node.value)}.{twin}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            return
        for twin in _twins(node.id):
            if any(twin in names for names in self.bound):
                self.replace("wrong twin variable", node, twin)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Slice):
            for bound in (node.slice.lower, node.slice.upper):
                if isinstance(bound, (ast.Name, ast.Attribute)):
                    self.replace("off by one", bound, f"{self.text(bound)} + 1")
            if node.slice.lower is not None or node.slice.upper is not None:
                self.replace("argument dropped", node, f"{self.text(node.value)}[:]")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.casts(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "range" and node.args and not isinstance(node.args[-1], ast.Constant):
            self.replace("off by one", node.args[-1], f"{self.text(node.args[-1])} - 1")
        pieces: list[ast.expr | ast.keyword] = [*node.args, *node.keywords]
        spans = [self.piece(x) for x in pieces]
        for i, piece in enumerate(pieces):
            if isinstance(piece, ast.keyword) and piece.arg in AXES:
                self.axis(piece.value)
            named = isinstance(piece, ast.keyword) and piece.arg != "strict"  # of zip, a check of its own
            dropped = named or (i == len(node.args) - 1 and i > 0)
            if dropped and len(pieces) > 1 and not isinstance(piece, ast.Starred):
                start = spans[i - 1][1] if i else spans[i][0]
                end = spans[i][1] if i else spans[i + 1][0]
                self.add("argument dropped", start, end, "")
        for i in range(len(node.args) - 1):
            first, second = node.args[i : i + 2]
            simple = (ast.Name, ast.Attribute, ast.Subscript)
            if isinstance(first, simple) and isinstance(second, simple) and self.text(first) != self.text(second):
                if name in COMMUTATIVE:
                    continue
                middle = self.source[self.end(first) : self.start(second)].decode()
                new = f"{self.text(second)}{middle}{self.text(first)}"
                self.add("argument swapped", self.start(first), self.end(second), new)
        self.generic_visit(node)

    def piece(self, x: ast.expr | ast.keyword) -> tuple[int, int]:
        if isinstance(x, ast.keyword):
            return self.lines[x.lineno - 1] + x.col_offset, self.end(x.value)
        return self.start(x), self.end(x)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":
            self.visit(node.value)

    def axis(self, value: ast.expr) -> None:
        text = self.text(value)
        if re.fullmatch(r"-?\d", text):
            for new in {"-1": ("0", "-2"), "0": ("-1",), "1": ("0",)}.get(text, ("-1",)):
                self.replace("axis", value, new)

    def casts(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in CASTS:
            self.replace("dtype", node, self.text(node.func.value))
        elif isinstance(node.func, ast.Name) and node.func.id in CASTS and len(node.args) == 1:
            self.replace("dtype", node, self.text(node.args[0]))


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


def _is_text(node: ast.expr) -> bool:
    """A string or a list of literals, which `+` joins."""
    return isinstance(node, (ast.JoinedStr, ast.List, ast.Tuple)) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def _refuses(node: ast.If) -> bool:
    """Whether all that it does is to refuse bad input, and to say what was wrong with it."""
    return isinstance(node.body[-1], ast.Raise) and not node.orelse


def _is_quiet(statement: ast.stmt) -> bool:
    """Whether it does nothing but tell people, or refuse bad input."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return False
    called = statement.value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name.startswith(("check", "_check", "require", "refuse")) or name in QUIET


def _can_go(statement: ast.stmt, bound: set[str]) -> bool:
    """Whether the code around still runs without a statement: it calls, adds, or binds again what was bound."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    if isinstance(statement, ast.AugAssign):
        return True
    if isinstance(statement, ast.Assign):
        read = {x.id for x in ast.walk(statement.value) if isinstance(x, ast.Name)}
        written = {x.id for target in statement.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
        subscripted = all(isinstance(target, (ast.Subscript, ast.Attribute)) for target in statement.targets)
        return subscripted or (bool(written) and written <= read & bound)
    return isinstance(statement, (ast.If, ast.For)) and not any(
        isinstance(x, (ast.Return, ast.Yield, ast.YieldFrom, ast.Raise)) for x in ast.walk(statement)
    )


def _twins(name: str) -> Iterator[str]:
    for pair in TWINS:
        for one, other in (pair, pair[::-1]):
            new = re.sub(rf"(?:(?<=_)|^){one}(?=_|$)", other, name)
            if new != name:
                yield new


def defaults_of(*configs: Any) -> dict[str, Any]:
    """Field of a frozen config -> its default, for those that have a plain one."""
    plain = (int, float, bool, str, type(None))
    return {
        field.name: field.default
        for config in configs
        for field in dataclasses.fields(config)
        if isinstance(field.default, plain)
    }
