"""Canonical tensors and safetensors files."""

import numpy as np
import pytest

from llm_common.config import preset
from llm_common.errors import UserError
from llm_common.files.tensor_files import read_tensors, write_tensors
from llm_common.tensors import check_tensors, check_token_ids, decays, tensor_shapes


def test_shapes_count_as_many_parameters_as_the_config():
    for name in ("tiny", "demo", "350m"):
        cfg = preset(name)
        assert sum(int(np.prod(shape)) for shape in tensor_shapes(cfg).values()) == cfg.num_parameters()
    assert "lm_head.weight" not in tensor_shapes(preset("demo"))  # tied


def test_layer_ten_comes_after_layer_two():
    import dataclasses

    names = list(tensor_shapes(dataclasses.replace(preset("tiny"), num_hidden_layers=12)))
    assert names.index("model.layers.10.mlp.up_proj.weight") > names.index("model.layers.2.mlp.up_proj.weight")


def test_matrices_decay_and_gains_do_not():
    shapes = tensor_shapes(preset("tiny"))
    assert {name for name, shape in shapes.items() if not decays(shape)} == {n for n in shapes if "norm" in n}


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_tensors(tmp_path / "x.safetensors", {"x": x, "scalar": np.float64(3).reshape(())})
    read = read_tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["x"], x)
    assert read["scalar"] == 3
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        read_tensors(path)
    write_tensors(path, {"x": np.ones(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tensors(path)


def test_wrong_tensors_are_refused_by_name():
    cfg = preset("tiny")
    good = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(cfg).items()}
    check_tensors(cfg, good, "file")
    with pytest.raises(UserError, match="'lm_head.weight' is missing"):
        check_tensors(cfg, {k: v for k, v in good.items() if k != "lm_head.weight"}, "file")
    with pytest.raises(UserError, match="'extra' does not belong"):
        check_tensors(cfg, {**good, "extra": np.zeros(1)}, "file")
    with pytest.raises(UserError, match=r"'model.norm.weight' has shape \(3,\), but the config needs \(32,\)"):
        check_tensors(cfg, {**good, "model.norm.weight": np.zeros(3)}, "file")


@pytest.mark.parametrize(("ids", "words"), [([0, 96], "id 96"), ([-1, 5], "id -1"), ([0.5], "must be integers")])
def test_token_ids_out_of_range_are_refused(ids, words):
    with pytest.raises(UserError, match=words):
        check_token_ids(np.array(ids), 96, "prompt")
