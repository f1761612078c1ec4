"""transformers' Llama, built from our exported folder with every parameter random, agrees with all three witnesses."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from llm_common.config import preset
from llm_common.tensor_files import write_tensors
from parity import spec
from parity.cases import random_batch, random_weights
from parity.compare import tensor_errors
from parity.jax_side import JaxSide
from parity.torch_side import TorchSide

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "as given": preset("tiny"),
    "tied, one kv head": dataclasses.replace(preset("tiny"), tie_word_embeddings=True, num_key_value_heads=1),
    "llama 3 theta": dataclasses.replace(preset("tiny"), rope_theta=5e5, rms_norm_eps=1e-6, num_hidden_layers=3),
}


def float64_throughout():
    """transformers computes norms and rotary frequencies in float32 whatever the model's dtype: here in float64."""
    stack = mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
    return stack, mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_agrees_in_float64(name, tmp_path):
    cfg = CONFIGS[name]
    weights = random_weights(cfg, 0)
    ids, targets = random_batch(cfg, 0)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    write_tensors(tmp_path / "model.safetensors", weights)
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    types, method = float64_throughout()
    with types, method:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        logits = model(torch.tensor(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
        loss.backward()
    oracle = {"logits": logits.detach().numpy(), "loss": np.array(loss.item())}
    oracle |= {key: p.grad.numpy() for key, p in model.named_parameters()}

    for witness in (JaxSide(cfg, "float64"), TorchSide(cfg, "float64"), None):
        if witness is None:
            logits, (loss, grads) = spec.forward(weights, ids, cfg)[0], spec.loss_and_grads(weights, ids, targets, cfg)
        else:
            logits, (loss, grads) = witness.logits(weights, ids), witness.loss_and_grads(weights, ids, targets)
        errors = tensor_errors({"logits": logits, "loss": np.array(loss), **grads}, oracle)
        assert max(errors.values()) < 1e-12, (witness, errors)  # measured 3e-15


def test_the_oracle_would_see_a_wrong_epsilon(tmp_path):
    """1e-6 for 1e-5, which perplexity hides."""
    cfg = preset("tiny")
    weights, (ids, _) = random_weights(cfg, 0), random_batch(cfg, 0)
    wrong = dataclasses.replace(cfg, rms_norm_eps=1e-6)
    a, b = spec.forward(weights, ids, cfg)[0], spec.forward(weights, ids, wrong)[0]
    assert np.linalg.norm(a - b) / np.linalg.norm(b) > 1e-11
