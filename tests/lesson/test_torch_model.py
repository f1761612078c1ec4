"""Properties of the torch model. The twin is tests/lesson/test_jax_model.py."""

import dataclasses

import numpy as np
import pytest
import torch

from llm_common.config import preset
from llm_common.errors import UserError
from llm_common.tensors import tensor_shapes
from parity import spec
from parity.core.inputs import random_batch, random_weights
from torch_llm import attention, layers, rope
from torch_llm.engine.checkpoint import from_canonical, to_canonical
from torch_llm.fast.attention import attention_kernel, resolve_backend
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalLM, init_model

CFG = preset("tiny")
IDS = torch.tensor(random_batch(CFG, 0, batch=2, length=11, ignored=False)[0])


def make(cfg=CFG, seed=0) -> CausalLM:
    return from_canonical(CausalLM(cfg).double(), random_weights(cfg, seed))


def test_no_position_sees_a_later_one():
    model, t = make(), 5
    x = torch.randn(2, 11, CFG.hidden_size, dtype=torch.float64, requires_grad=True)
    model.model.embed_tokens.register_forward_hook(lambda *_: x)  # a gradient with respect to every position
    (gradient,) = torch.autograd.grad(model(IDS)[:, t].sum(), x)
    assert (gradient[:, t + 1 :] == 0).all()  # exactly
    assert (gradient[:, : t + 1].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_cached_decoding_is_the_full_forward_pass():
    model, cache = make(), KVCache(CFG, 2, 20, torch.float64)  # more slots than are used
    parts = [model(piece, cache) for piece in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:9], IDS[:, 9:])]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS), atol=1e-13, rtol=0)
    assert cache.length.tolist() == [11, 11]


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_mates():
    model = make()
    torch.testing.assert_close(model(IDS)[1:], model(IDS[1:]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_fused_attention_is_the_reference(heads, with_mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, n, 8, generator=generator) for n in (*heads, heads[1]))
    mask = attention.causal_mask(torch.arange(9), torch.arange(9)) if with_mask else None
    a, b = (attention_kernel(backend)(q, k, v, mask) for backend in ("reference", "sdpa"))
    torch.testing.assert_close(a, b, atol=3e-6, rtol=0)


@pytest.mark.parametrize("shape", [(9, 9), (2, 1, 9, 9), (1, 4, 9, 9), (2, 4, 9, 9)])
def test_a_mask_means_the_same_to_every_backend(shape):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, n, 8, generator=generator) for n in (4, 2, 2))
    mask = (torch.rand(shape, generator=generator) < 0.5) | torch.eye(9, dtype=torch.bool)
    full = torch.broadcast_to(mask, (2, 4, 9, 9))
    expected = torch.stack(
        [_one_head(q[:, :, n], k[:, :, n // 2], v[:, :, n // 2], full[:, n]) for n in range(4)], dim=2
    )
    for backend in ("reference", "sdpa"):
        out = attention_kernel(backend)(q, k, v, mask)
        torch.testing.assert_close(out, expected, atol=3e-6, rtol=0)


def _one_head(q, k, v, mask):
    scores = torch.where(mask, torch.einsum("bth,bsh->bts", q, k) / 8**0.5, -torch.inf)
    return torch.einsum("bts,bsh->bth", torch.softmax(scores, -1), v)


def test_rope_takes_positions_of_each_row():
    x, angles = np.random.default_rng(0).standard_normal((2, 5, 3, 8)), np.arange(10)[:, None] / np.arange(1, 5)
    positions = np.array([[0, 1, 2, 3, 4], [3, 3, 7, 9, 0]])
    cos, sin = (torch.tensor(f(angles)[positions]) for f in (np.cos, np.sin))
    rotated = rope.apply_rope(torch.tensor(x), cos, sin).numpy()
    np.testing.assert_allclose(rotated[0], spec.rotate(x[:1], angles[:5])[0], atol=1e-14)
    np.testing.assert_allclose(rotated[1, 2], spec.rotate(x[1:, 2:3], angles[7:8])[0, 0], atol=1e-14)


def test_unknown_backends_are_refused():
    with pytest.raises(UserError, match="'flash' is unknown"):
        attention_kernel("flash")


@pytest.mark.parametrize(
    ("setting", "dtype", "backend"),
    [
        ("auto", "bfloat16", "sdpa"),
        ("auto", "float32", "sdpa"),
        ("auto", "float64", "reference"),
        ("fused", "float32", "sdpa"),
        ("reference", "bfloat16", "reference"),
    ],
)
def test_the_backend_is_resolved_from_the_dtype(setting, dtype, backend):
    assert resolve_backend(setting, dtype) == backend


@pytest.mark.parametrize("tied", [False, True])
def test_canonical_tensors_go_in_and_come_out(tied):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied, num_hidden_layers=12)
    weights = random_weights(cfg, 1)
    back = to_canonical(make(cfg, 1))
    assert list(back) == list(tensor_shapes(cfg))
    for name, x in weights.items():
        np.testing.assert_array_equal(back[name], x)
        assert back[name].flags.c_contiguous


def test_the_state_dict_is_the_canonical_form():
    for tied in (False, True):
        cfg = dataclasses.replace(CFG, tie_word_embeddings=tied)
        state = CausalLM(cfg).state_dict()
        assert {name: tuple(x.shape) for name, x in state.items()} == tensor_shapes(cfg)


def test_loading_copies():
    weights = random_weights(CFG, 1, "float64")
    model = from_canonical(CausalLM(CFG).double(), weights)
    before = model.model.norm.weight.detach().clone()
    weights["model.norm.weight"][:] = 7.0
    assert torch.equal(model.model.norm.weight, before)


def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, other = (to_canonical(init_model(CFG, seed, torch.float32, "cpu")) for seed in (0, 0, 1))
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])
        if "norm" in name:
            assert (x == 1).all()
        else:
            assert not np.array_equal(x, other[name])
            std = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert x.std() == pytest.approx(std, rel=0.1)
    assert not np.array_equal(a["model.layers.0.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])


def test_the_rotary_table_is_not_rounded_with_the_module():
    model = CausalLM(CFG).to(torch.bfloat16)
    cos, _ = model.model.places.rotary_table(torch.arange(5), torch.float64)
    assert cos.dtype == torch.float64
    assert (cos != cos.to(torch.bfloat16).double()).any()


def test_a_text_past_the_table_is_refused():
    with pytest.raises(UserError, match="the input needs 65 positions but max_position_embeddings = 64"):
        make()(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(UserError, match="the KV cache needs 65"):
        KVCache(CFG, 1, 65, torch.float32)
    cache = KVCache(CFG, 2, 5, torch.float64)
    with pytest.raises(IndexError, match="5 slots"):
        make()(IDS, cache)


def test_embedding_gradients_are_summed_in_float32():
    table = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    out = layers.embedding(torch.zeros(1, 1000, dtype=torch.long), table)
    (gradient,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert gradient[0, 0] == 1000  # a bfloat16 sum stops at 256
