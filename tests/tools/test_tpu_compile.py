"""The TPU's compiler on a machine without a TPU, and the reading of compiled programs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_tools.hlo import Program, sizes_of

ROOT = Path(__file__).parent.parent.parent

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %deep = f32[4]{0} all-reduce(%x), channel_id=3, to_apply=%add, metadata={op_name="jit(step)/while/inner"}
}

%inner_condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=2, dimensions={0}
  %again = bf16[8,16]{1,0} all-gather(%shard), channel_id=2, dimensions={0}
  %loop = (s32[], f32[4]) while(%init), condition=%inner_condition, body=%inner_body
}

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %first = (bf16[4,16], bf16[8,16]) all-gather-start(%x), channel_id=1, dimensions={0}
  %kernel = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %outer = (s32[], f32[4]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_counted_with_their_loops():
    program = Program(TEXT)
    found = {(c.kind, c.size, c.depth, c.times) for c in program.collectives()}
    assert found == {
        ("all-gather", 256, 0, 1),  # the larger of a start's two shapes is what comes out
        ("all-gather", 256, 1, 3),  # one channel, though it stands there twice
        ("all-reduce", 16, 2, 15),  # a loop in a loop; the inner one's count is in its condition
    }
    assert program.custom_calls() == {"tpu_custom_call": 1}
    assert sizes_of("(f32[2,3]{1,0:T(8,128)}, s8[], pred[7])") == [24, 1, 7]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x2", "fsdp=2,tensor=2"), ("v6e:2x4", "data=2,fsdp=4"), ("v5p:2x2x2", "fsdp=4,tensor=2")],
)
def test_two_layers_compile_for_a_tpu(topology, mesh, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install '.[tpu]'")
    file = tmp_path / "rows.jsonl"
    flags = [
        "--preset",
        "1b",
        "--layers",
        "2",
        "--seq-len",
        "512",
        "--topology",
        topology,
        "--mesh",
        mesh,
        "--out",
        str(file),
    ]
    subprocess.run([sys.executable, ROOT / "scripts" / "tpu_compile.py", *flags], check=True, timeout=600)
    train, decode = (json.loads(line) for line in file.read_text().splitlines())
    assert train["fits"]
    assert decode["fits"]
    assert train["custom_calls"]["tpu_custom_call"] >= 3  # splash attention forward, again, and backward
    weights = 12 * 2 * 32_768 * 2048 / 8  # more than this is kept: embedding, head and their moments
    assert train["arguments"] > weights
    assert train["moved"] > 0
    head = [c for c in train["collectives"] if "[32768,2048]" in c["shape"].split(" ")[0]]
    assert all(c["depth"] == 0 for c in head)  # the head is not gathered again in a loop


def test_a_topology_that_is_not_known():
    command = [sys.executable, ROOT / "scripts" / "tpu_compile.py", "--topology", "v9:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "version 'v9' is unknown; known: v5e, v5p, v6e" in done.stderr
