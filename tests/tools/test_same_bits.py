"""Two checkouts beside each other: the same ones are equal, and a change of one constant is seen."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "same_bits.py"
PROGRAM = """module @jit_step {{
  func.func public @main(%arg0: tensor<f32> loc("x")) -> tensor<f32> {{
    %0 = call @{name}(%arg0) : (tensor<f32>) -> tensor<f32> loc(#loc3)
{lines}
  }}
  func.func private @{name}(%arg0: tensor<f32>) -> tensor<f32> {{}}
}}
#loc3 = loc("{place}":1:2)
"""


@pytest.fixture(scope="module")
def same_bits():
    return runpy.run_path(str(SCRIPT))


def test_differences_are_named(same_bits):
    row = {"model": "a", "log": [{"loss": 1.0}, {"loss": 2.0}], "programs": ["jit_step 1"]}
    assert same_bits["differences"](row, dict(row)) == []
    (found,) = same_bits["differences"](row, {**row, "log": [{"loss": 1.0}, {"loss": 2.5}]})
    assert "line 2" in found
    assert same_bits["differences"](row, {**row, "model": "b"}) == ["model"]
    (found,) = same_bits["differences"](row, {**row, "programs": ["jit_step 2"]})
    assert "jit_step 1" in found
    assert same_bits["differences"](row, {}) != []  # a row that is missing is a difference


def test_a_program_is_its_text_without_places_and_names(same_bits, tmp_path):
    digests = []
    for number, (name, place, operation) in enumerate(
        [("relu", "a.py", "add"), ("_relu", "b.py", "add"), ("relu", "a.py", "multiply")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        lines = "\n".join([f"    %{i} = stablehlo.{operation} %0, %0 : tensor<f32>" for i in range(1, 60)])
        (folder / "jax_ir0_jit_step_compile.mlir").write_text(PROGRAM.format(name=name, place=place, lines=lines))
        digests.append(list(same_bits["programs_in"](folder)))
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 1


def test_every_row_has_another_name(same_bits):
    rows = same_bits["names_of_rows"]([])
    assert len(rows) == len(set(rows)) > 90
    assert same_bits["names_of_rows"](["no such row"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_constant_that_changes_is_seen(framework, tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "head", ignore=ignored)
    command = [sys.executable, SCRIPT, ROOT, tmp_path / "head", "--rows", f"{framework}:float64:llama:plain"]
    same = subprocess.run(command, capture_output=True, text=True)
    assert (same.returncode, "1 of 1 rows have the same bits" in same.stdout) == (0, True), same.stdout + same.stderr
    path = tmp_path / "head" / f"{framework}_llm" / "layers.py"
    text = path.read_text(encoding="utf-8")
    changed = text.replace("+ eps", "+ 1.0000001 * eps")
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1, other.stdout + other.stderr
    assert "log from line" in other.stdout
