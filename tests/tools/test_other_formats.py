"""Checkpoints in the formats of Orbax and of torch's distributed checkpoints."""

import numpy as np
import pytest

from llm_common.config import preset
from llm_common.run.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from llm_common.tensors import tensor_shapes
from llm_common.text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["orbax", "dcp"])
def test_a_checkpoint_goes_through_another_format_and_comes_back(kind, tmp_path, run):
    if kind == "orbax":
        pytest.importorskip("orbax.checkpoint")
    cfg = preset("tiny")
    shapes, rng = tensor_shapes(cfg), np.random.default_rng(0)
    parts = [{name: rng.standard_normal(x).astype(np.float32) for name, x in shapes.items()} for _ in range(3)]
    saved = save_checkpoint(tmp_path / "run", cfg, TrainingState(*parts, 7, 6), {"seed": 3}, Tokenizer([]))
    there, back = tmp_path / kind, tmp_path / "again"
    code, _, err = run("convert_checkpoint", "--from", saved, f"--to-{kind}", there)
    assert (code, err) == (0, "")
    code, _, err = run("convert_checkpoint", f"--from-{kind}", there, "--like", saved, "--to", back)
    assert (code, err) == (0, "")
    (folder,) = back.iterdir()
    _, state, settings = load_checkpoint(folder, cfg)
    assert (state.step, state.adam_count, settings) == (7, 6, {"seed": 3})
    for part, expected in zip(("weights", "mu", "nu"), parts, strict=True):
        for name, x in expected.items():
            np.testing.assert_array_equal(getattr(state, part)[name], x)
    code, _, err = run("convert_checkpoint", "--from", saved, f"--to-{kind}", there)
    assert (code, "is there already" in err) == (2, True)
    code, _, err = run("convert_checkpoint", f"--from-{kind}", tmp_path / "nothing", "--like", saved, "--to", back)
    assert (code, "nothing: n" in err) == (2, True)
