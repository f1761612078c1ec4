"""GGUF files, read by transformers and by the package that defines them."""

import dataclasses
import json

import numpy as np
import pytest

import llm_tools.programs.export as program
from llm_common.config import RopeScaling, preset
from llm_common.errors import UserError
from llm_common.files.gguf_export import export_gguf, gguf_name, rope_factors
from llm_common.tensors import tensor_shapes
from llm_common.text import bpe_reference
from llm_common.text.tokenizer import Tokenizer
from parity import spec
from parity.core.inputs import random_weights

gguf = pytest.importorskip("gguf")
SCALED = RopeScaling(8.0, 1.0, 4.0, 64)
CONFIGS = {
    "llama": {},
    "llama, tied, one kv head": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 300.0},
    "llama 3": {"rope_scaling": SCALED, "rms_norm_eps": 1e-4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "head_dim": 128,
    },  # which is what transformers assumes
}


def model(**changes):
    shape = {"vocab_size": 301, "head_dim": 8, "hidden_size": 64, "intermediate_size": 96}
    cfg = dataclasses.replace(preset("tiny"), **{**shape, **changes})
    return cfg, random_weights(cfg, 3, "float32")


def tokenizer(pattern="gpt2"):
    merges = bpe_reference.train(["low lower lowest new newer newest wide wider " * 3], 44, "<|endoftext|>")
    return Tokenizer(merges, pattern=pattern)


def theirs(path, cfg):
    """transformers' model of a GGUF file, which it reads in its own way, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert found.config.num_hidden_layers == cfg.num_hidden_layers
    return found.eval()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama 3"])
def test_transformers_reads_the_model_that_was_written(tmp_path, name):
    import torch

    cfg, weights = model(**CONFIGS[name])
    path = tmp_path / "m.gguf"
    export_gguf(path, cfg, weights, tokenizer(), "float32")
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    wanted = spec.forward({k: x.astype(np.float64) for k, x in weights.items()}, ids, spec.architecture(cfg))[0]
    with torch.no_grad():
        found = theirs(path, cfg)(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_every_tensor_and_field_is_there_once(tmp_path):
    cfg, weights = model(**CONFIGS["llama 3"])
    path = tmp_path / "m.gguf"
    assert export_gguf(path, cfg, weights, tokenizer("llama3"), "float32") == path.stat().st_size
    reader = gguf.GGUFReader(path)
    names = [x.name for x in reader.tensors]
    assert sorted(names) == sorted({*map(gguf_name, tensor_shapes(cfg)), "rope_freqs.weight"})
    value = lambda key: reader.fields[key].contents()
    assert value("llama.rope.freq_base") == cfg.rope_theta
    assert value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-4)
    assert value("llama.attention.head_count_kv") == 2
    assert value("tokenizer.ggml.pre") == "llama-bpe"
    assert len(value("tokenizer.ggml.tokens")) == 301
    assert value("tokenizer.ggml.eos_token_id") == tokenizer().end_of_text
    factors = rope_factors(cfg)
    assert factors[0] == 1.0  # turns often: left alone
    assert factors[-1] == pytest.approx(8.0)  # turns rarely: slowed down by the whole factor
    assert np.array_equal(next(x for x in reader.tensors if x.name == "rope_freqs.weight").data, factors)


# q8_0: half a step of a scale that is itself rounded to float16, times at most 127 steps
@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 0.5 / 127 + 2**-11)])
def test_narrow_types_round_as_they_say(tmp_path, dtype, error):
    cfg, weights = model()
    path = tmp_path / "m.gguf"
    export_gguf(path, cfg, weights, None, dtype)
    found = {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(path).tensors}
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        x, y = weights[name], found[gguf_name(name)].reshape(weights[name].shape)
        scale = np.abs(x) if dtype != "q8_0" else np.abs(x.reshape(-1, 32)).max(1).repeat(32).reshape(x.shape)
        assert (np.abs(x - y) <= error * scale + 1e-7).all()
        assert np.abs(x - y).max() > 0
    norm = "model.norm.weight"
    assert np.array_equal(found["output_norm.weight"].ravel(), weights[norm])  # vectors stay float32
    assert "output.weight" in found


def test_text_ends_where_the_checkpoint_says(tmp_path):
    cfg, weights = model()
    path = tmp_path / "m.gguf"
    own = tokenizer().end_of_text
    export_gguf(path, cfg, weights, tokenizer(), stops=[own, 7, 9])
    fields = gguf.GGUFReader(path).fields
    assert [fields[f"tokenizer.ggml.{x}_token_id"].contents() for x in ("eos", "eot", "eom")] == [own, 7, 9]
    export_gguf(path, cfg, weights, tokenizer())
    assert "tokenizer.ggml.eot_token_id" not in gguf.GGUFReader(path).fields
    with pytest.raises(UserError, match="names 3 of them at most"):
        export_gguf(path, cfg, weights, tokenizer(), stops=[7, 8, 9])


def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, capsys):
    cfg, weights = model(model_type="mistral", sliding_window=4)
    with pytest.raises(UserError, match="no sliding window"):
        export_gguf(tmp_path / "m.gguf", cfg, weights, None)
    cfg, weights = model()
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.inf
    with pytest.raises(UserError, match="model.norm.weight"):
        export_gguf(tmp_path / "m.gguf", cfg, weights, None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="ends in .gguf"):
        program.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "x"), "--dtype", "q8_0"])


def test_the_program_writes_one_from_a_folder(tmp_path, capsys):
    from llm_common.files.export import export

    cfg, weights = model()
    export(tmp_path / "hf", cfg, weights, tokenizer(), stops=[7])
    program.main(["--checkpoint", str(tmp_path / "hf"), "--out", str(tmp_path / "m.gguf"), "--dtype", "q8_0"])
    assert "q8_0" in capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == 7
    pieces = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["vocab"]
    assert reader.fields["tokenizer.ggml.tokens"].contents()[:256] == sorted(pieces, key=pieces.get)[:256]
