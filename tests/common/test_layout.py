"""Who may import whom, and that the two sides mirror each other file by file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "llm_common": {"jax", "jaxlib", "flax", "optax", "torch", "jax_llm", "torch_llm", "parity", "llm_tools"},
    "jax_llm": {"torch", "torch_llm", "parity", "llm_tools"},
    "torch_llm": {"jax", "jaxlib", "flax", "optax", "jax_llm", "parity", "llm_tools"},
    "parity": {"llm_tools"},
}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    return {name.split(".")[0] for name in modules(path)}


def modules(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; what is imported from one of ours is a module if it is a
    file.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if (ROOT / f"{name.replace('.', '/')}.py").exists() else node.module or "" for name in names}
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_arrows(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def test_the_specification_imports_none_of_the_packages():
    for name in ("spec", "spec_config", "spec_run"):
        assert imported(ROOT / f"parity/{name}.py") <= {"hashlib", "math", "numpy", "types", "parity"}
        source = (ROOT / f"parity/{name}.py").read_text(encoding="utf-8")
        assert all(
            line.split()[-1] in ("spec", "architecture")
            for line in source.splitlines()
            if line.startswith("from parity")
        )


def test_a_forbidden_import_would_be_seen(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from torch.nn import functional\n")
    assert imported(file) & FORBIDDEN["jax_llm"] == {"torch"}


KNOWN = {"llm_common", "jax_llm", "torch_llm", "parity", "llm_tools"}


def folders_imported() -> dict[str, set[str]]:
    """Of each folder of the packages: the folders that its files import from."""
    found: dict[str, set[str]] = {}
    for package in KNOWN:
        for path in (ROOT / package).rglob("*.py"):
            if path.name in ("__init__.py", "__main__.py"):  # faces: they hand names on
                continue
            own = ".".join(path.relative_to(ROOT).parts[:-1])
            for name in modules(path):
                is_file = (ROOT / f"{name.replace('.', '/')}.py").exists()
                folder = name.rpartition(".")[0] if is_file else name
                if folder != own and (ROOT / folder.replace(".", "/")).is_dir() and folder.split(".")[0] in KNOWN:
                    found.setdefault(own, set()).add(folder)
    return found


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The folders from which a way leads back to them."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for folder in arrows.get(todo.pop(), ()):
                if folder not in seen:
                    seen.add(folder)
                    todo.append(folder)
        return seen

    return [folder for folder in arrows if folder in reached(folder)]


def test_no_circle_between_folders():
    arrows = folders_imported()
    assert len(arrows) > 15
    assert not circles(arrows)
    arrows.setdefault("llm_common", set()).add("parity.core")
    assert {"llm_common", "parity.core"} <= set(circles(arrows))


TAUGHT = ("layers", "rope", "attention", "model", "loss", "optim", "sampling")
LESSON = (*TAUGHT, "kernels", "kv_cache", "random_bits", "documents", "params")
GROUND_FLOOR = {"errors", "config", "hf_config", "tensors", "rope", "random_bits", "schedule", "sharding"}


@pytest.mark.parametrize("side", ["jax_llm", "torch_llm"])
def test_a_lesson_file_imports_the_lesson_and_the_ground_floor_alone(side):
    allowed = {f"{side}.{name}" for name in LESSON} | {f"llm_common.{name}" for name in GROUND_FLOOR}
    ours = lambda path: {name for name in modules(path) if name.split(".")[0] in FORBIDDEN}
    for name in LESSON:
        path = ROOT / side / f"{name}.py"
        if path.exists():
            assert ours(path) <= allowed, path
    assert ours(ROOT / side / "engine/train.py") - allowed  # what is not the lesson does import more


def branches(path: Path) -> int:
    """`if`, conditional expressions, `and` and `or` of a file."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        count += isinstance(node, ast.If | ast.IfExp)
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        count += len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return count


@pytest.mark.parametrize("side", ["jax_llm", "torch_llm"])
def test_a_branch_of_the_lesson_is_one_of_the_mathematics(side):
    assert sum(branches(ROOT / side / f"{name}.py") for name in TAUGHT) <= 30


def test_the_two_sides_hold_the_same_files():
    """But for what is chosen for speed, and for JAX's trees of parameters, in whose place torch has modules."""
    names = [
        sorted(p.relative_to(ROOT / side).as_posix() for p in (ROOT / side).rglob("*.py") if p.parent.name != "fast")
        for side in ("jax_llm", "torch_llm")
    ]
    assert [name for name in names[0] if name != "params.py"] == names[1]


@pytest.mark.parametrize("name", ["layers", "attention", "model", "loss", "optim", "sampling", "random_bits"])
def test_shared_concepts_come_in_the_same_order(name):
    def definitions(side: str) -> list[str]:
        tree = ast.parse((ROOT / side / f"{name}.py").read_text(encoding="utf-8"))
        return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

    jax, torch = definitions("jax_llm"), definitions("torch_llm")
    shared = set(jax) & set(torch)
    assert len(shared) >= 2
    assert [n for n in jax if n in shared] == [n for n in torch if n in shared]


@pytest.mark.parametrize("side", ["jax_llm", "torch_llm"])
def test_no_line_of_the_teaching_text_is_too_long_to_read(side):
    for name in TAUGHT:
        for number, line in enumerate((ROOT / side / f"{name}.py").read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120, f"{side}/{name}.py:{number}: {len(line)} columns"


@pytest.mark.parametrize("side", ["jax_llm", "torch_llm"])
def test_all_families_fit_two_short_files(side):
    assert sum(len((ROOT / side / f"{name}.py").read_text().splitlines()) for name in ("model", "attention")) < 350


def test_the_reference_of_the_tokenizer_is_short_and_imports_none_of_the_packages():
    assert len((ROOT / "llm_common/text/bpe_reference.py").read_text().splitlines()) <= 100
    assert imported(ROOT / "llm_common/text/bpe_reference.py") == {"itertools", "collections", "regex"}


def test_messages_of_the_library_speak_of_fields():
    """A program turns `some_field` into --some-field; a library knows no flags. Commands to type are another thing."""
    known = re.compile(r"(?<![\w=-])--[a-z]")
    command = re.compile(r"pip install|hf download|scripts/\w+\.py|one-model [a-z-]+")
    for package in ("llm_common", "jax_llm", "torch_llm"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "command_line.py":  # the parser itself
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise):
                    text = " ".join(
                        x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)
                    )
                    assert command.search(text) or not known.search(text), f"{path}: {text}"
