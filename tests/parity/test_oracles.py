"""transformers' own models agree with all three witnesses: our folders read by it, and its folders read by us.

Built from tiny random configs with every parameter random, and sequences longer than the window and the original
length.
"""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from llm_common.config import preset
from llm_common.files.export import export
from llm_common.files.tensor_files import write_tensors
from llm_common.run.checkpoint import load_weights
from parity import spec
from parity.core.compare import tensor_errors
from parity.core.inputs import families, random_batch, random_weights
from parity.sides.jax_side import JaxSide
from parity.sides.torch_side import TorchSide

transformers = pytest.importorskip("transformers")

TINY = preset("tiny")
# transformers' Qwen2 has no head_dim of its own
SQUARE = dataclasses.replace(TINY, head_dim=4)
CONFIGS = {
    "as given": TINY,
    "tied, one kv head": dataclasses.replace(TINY, tie_word_embeddings=True, num_key_value_heads=1),
    "llama 3 theta": dataclasses.replace(TINY, rope_theta=5e5, rms_norm_eps=1e-6, num_hidden_layers=3),
    **{name: cfg for name, cfg in families(TINY).items() if cfg.model_type != "qwen2"},
    "Qwen2: biases": families(SQUARE)["Qwen2: biases"],
}
LENGTH = 40
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What their config classes are given, as the published models have it.
THEIRS = {
    "Llama 2, TinyLlama": ("Llama", {}),
    "SmolLM2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "Llama 3.1": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "Llama, free head_dim": ("Llama", {"head_dim": 6}),
    "Mistral": ("Mistral", {"sliding_window": 7}),
    "Mistral without a window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "Qwen2.5": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"rope_theta": 1e6, "head_dim": 12}),
}


def float64_throughout():
    """transformers computes norms and rotary frequencies in float32 whatever the model's dtype: here in float64."""
    stack = mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
    return stack, mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def oracle_results(model, ids, targets) -> dict[str, np.ndarray]:
    """Logits, loss and gradients of a transformers model, in float64 throughout."""
    types, method = float64_throughout()
    with types, method:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        logits = model(torch.tensor(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
        loss.backward()
    results = {"logits": logits.detach().numpy(), "loss": np.array(loss.item())}
    return results | {key: p.grad.numpy() for key, p in model.named_parameters()}


def check_all_witnesses(cfg, weights, ids, targets, oracle) -> None:
    for witness in (JaxSide(cfg, "float64"), TorchSide(cfg, "float64"), None):
        if witness is None:
            logits, (loss, grads) = spec.forward(weights, ids, cfg)[0], spec.loss_and_grads(weights, ids, targets, cfg)
        else:
            logits, (loss, grads) = witness.logits(weights, ids), witness.loss_and_grads(weights, ids, targets)
        errors = tensor_errors({"logits": logits, "loss": np.array(loss), **grads}, oracle)
        assert max(errors.values()) < 1e-12, (witness, errors)  # measured 5e-15


@pytest.mark.parametrize("name", CONFIGS)
def test_our_folder_in_transformers(name, tmp_path):
    cfg = CONFIGS[name]
    weights = random_weights(cfg, 0)
    ids, targets = random_batch(cfg, 0, length=LENGTH)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    write_tensors(tmp_path / "model.safetensors", weights)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    check_all_witnesses(cfg, weights, ids, targets, oracle_results(model, ids, targets))


@pytest.mark.parametrize("name", THEIRS)
def test_their_folder_in_both_sides(name, tmp_path):
    """A model that transformers made and saved, in one file and in shards, with the config keys of its versions 4 and
    5.
    """
    family, settings = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        for key, p in model.named_parameters():  # biases start at 0 and norms at 1: a loader that drops them would pass
            x = torch.randn_like(p) * (0.3 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5)
            p.copy_(1 + x if key.endswith("norm.weight") else x)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    cfg, weights = load_weights(tmp_path / "whole")
    sharded_cfg, sharded = load_weights(tmp_path / "shards")
    assert cfg == sharded_cfg
    assert sorted(weights) == sorted(sharded)
    for key, x in weights.items():
        np.testing.assert_array_equal(x, sharded[key])
    ids, targets = random_batch(cfg, 0, length=LENGTH)
    assert ids.shape[1] == LENGTH
    check_all_witnesses(cfg, weights, ids, targets, oracle_results(model, ids, targets))
    old = version_4(json.loads((tmp_path / "whole" / "config.json").read_text()))
    (tmp_path / "whole" / "config.json").write_text(json.dumps(old))
    assert load_weights(tmp_path / "whole")[0] == cfg


def version_4(config: dict) -> dict:
    """A config.json of transformers 5 as version 4 wrote it."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_exported_and_loaded_again(dtype, tmp_path):
    """There and back through transformers, in each dtype, in one file and in shards: the same weights, rounded once."""
    cfg = CONFIGS["Qwen3: norms of q and k"]
    weights = random_weights(cfg, 0, "float32")  # from float64 torch would round to float16 twice
    export(tmp_path / "whole", cfg, weights, None, dtype)
    export(tmp_path / "shards", cfg, weights, None, dtype, shard_bytes=10_000)
    for name in ("whole", "shards"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == getattr(torch, dtype)
        back_cfg, back = load_weights(tmp_path / name)
        assert back_cfg == cfg
        for key, p in model.state_dict().items():
            expected = torch.tensor(weights[key]).to(getattr(torch, dtype))
            assert torch.equal(p, expected)
            np.testing.assert_array_equal(np.asarray(back[key], np.float64), expected.double().numpy())


def test_the_oracle_would_see_a_wrong_epsilon():
    """1e-6 for 1e-5, which perplexity hides."""
    weights, (ids, _) = random_weights(TINY, 0), random_batch(TINY, 0)
    wrong = dataclasses.replace(TINY, rms_norm_eps=1e-6)
    a, b = spec.forward(weights, ids, TINY)[0], spec.forward(weights, ids, wrong)[0]
    assert np.linalg.norm(a - b) / np.linalg.norm(b) > 1e-11
