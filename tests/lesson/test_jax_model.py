"""Properties of the JAX model. The twin is tests/lesson/test_torch_model.py."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_llm import attention, layers, rope
from jax_llm.engine.checkpoint import from_canonical, to_canonical
from jax_llm.engine.gradients import loss_and_grads
from jax_llm.fast.attention import attention_kernel, resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.kv_cache import init_cache
from jax_llm.model import PLAIN, CausalLM, init_params
from llm_common.config import preset
from llm_common.errors import UserError
from llm_common.tensors import tensor_shapes
from parity import spec
from parity.core.inputs import random_batch, random_weights

CFG = preset("tiny")
IDS, TARGETS = random_batch(CFG, 0, batch=2, length=11, ignored=False)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_params(cfg=CFG, seed=0):
    return from_canonical(cfg, random_weights(cfg, seed))


def apply(params, ids=IDS, cfg=CFG, cache=None, kernels=PLAIN):
    logits, cache = CausalLM(cfg, kernels).apply({"params": params}, jnp.array(ids), cache)
    return logits if cache is None else (logits, cache)


def test_no_position_sees_a_later_one():
    params, t = make_params(), 5

    def logits_of(x):  # hidden states in place of the embedding: a gradient with respect to every position
        table = layers.Embedding(CFG.vocab_size, CFG.hidden_size, PLAIN, parent=None)
        with nn.intercept_methods(lambda f, a, k, c: x if isinstance(c.module, type(table)) else f(*a, **k)):
            return apply(params)[:, t].sum()

    x = jax.random.normal(jax.random.key(0), (2, 11, CFG.hidden_size), jnp.float64)
    gradient = jax.grad(logits_of)(x)
    assert (gradient[:, t + 1 :] == 0).all()  # exactly
    assert (jnp.abs(gradient[:, : t + 1]).sum(-1) > 0).all()


def test_cached_decoding_is_the_full_forward_pass():
    params, cache = make_params(), init_cache(CFG, 2, 20, jnp.float64)  # more slots than are used
    parts = []
    for piece in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:9], IDS[:, 9:]):
        logits, cache = apply(params, piece, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), apply(params), atol=1e-13)
    assert cache.length.tolist() == [11, 11]


def test_a_row_does_not_depend_on_its_batch_mates():
    params = make_params()
    np.testing.assert_allclose(apply(params)[1:], apply(params, IDS[1:]), atol=1e-13)


def test_scan_and_loop_are_the_same_function():
    params, scanned = make_params(), make_kernels(scan_layers=True)
    np.testing.assert_allclose(apply(params, kernels=scanned), apply(params), atol=1e-13)
    batch = jnp.array(IDS), jnp.array(TARGETS)
    results = [loss_and_grads(CausalLM(CFG, kernels), params, *batch) for kernels in (PLAIN, scanned)]
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_fused_attention_is_the_reference(heads, with_mask):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 9, n, 8), jnp.float32) for i, n in enumerate((*heads, heads[1]))
    )
    mask = attention.causal_mask(jnp.arange(9), jnp.arange(9)) if with_mask else None
    a, b = (attention_kernel(backend)(q, k, v, mask) for backend in ("reference", "xla"))
    np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("shape", [(9, 9), (2, 1, 9, 9), (1, 4, 9, 9), (2, 4, 9, 9)])
def test_a_mask_means_the_same_to_every_backend(shape):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, n, 8), jnp.float32) for i, n in enumerate((4, 2, 2)))
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, shape) | jnp.eye(9, dtype=bool)
    full = np.broadcast_to(mask, (2, 4, 9, 9))
    expected = np.stack([_one_head(q[:, :, n], k[:, :, n // 2], v[:, :, n // 2], full[:, n]) for n in range(4)], axis=2)
    for backend in ("reference", "xla"):
        np.testing.assert_allclose(attention_kernel(backend)(q, k, v, mask), expected, atol=3e-6)


def _one_head(q, k, v, mask):
    scores = np.where(mask, np.einsum("bth,bsh->bts", q, k) / np.sqrt(8), -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bts,bsh->bth", e / e.sum(-1, keepdims=True), v)


def test_rope_takes_positions_of_each_row():
    x, angles = np.random.default_rng(0).standard_normal((2, 5, 3, 8)), np.arange(10)[:, None] / np.arange(1, 5)
    positions = np.array([[0, 1, 2, 3, 4], [3, 3, 7, 9, 0]])
    rotated = rope.apply_rope(jnp.array(x), jnp.cos(angles)[positions], jnp.sin(angles)[positions])
    np.testing.assert_allclose(rotated[0], spec.rotate(x[:1], angles[:5])[0], atol=1e-14)
    np.testing.assert_allclose(rotated[1, 2], spec.rotate(x[1:, 2:3], angles[7:8])[0, 0], atol=1e-14)


def test_fused_attention_refuses_float64_and_unknown_backends():
    x = jnp.ones((1, 2, 1, 2))
    with pytest.raises(UserError, match="float64 at float32 accuracy"):
        attention_kernel("xla")(x, x, x)
    with pytest.raises(UserError, match="'flash' is unknown"):
        attention_kernel("flash")


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "length", "backend"),
    [
        ("auto", "cpu", "bfloat16", 64, "reference"),
        ("auto", "gpu", "bfloat16", 64, "cudnn"),
        ("auto", "gpu", "bfloat16", 13, "xla"),
        ("auto", "gpu", "float32", 64, "xla"),
        ("auto", "tpu", "bfloat16", 64, "xla"),
        ("auto", "gpu", "float64", 64, "reference"),
        ("fused", "cpu", "float32", 64, "xla"),
        ("reference", "gpu", "bfloat16", 64, "reference"),
    ],
)
def test_the_backend_is_resolved_from_the_device_and_shape(setting, platform, dtype, length, backend):
    cfg = dataclasses.replace(CFG, head_dim=16)
    assert resolve_backend(setting, platform, dtype, cfg, length) == backend


def test_cudnn_is_not_chosen_for_heads_it_refuses():
    assert resolve_backend("auto", "gpu", "bfloat16", CFG, 64) == "xla"  # head_dim 10


def test_fused_float64_is_refused_before_any_work():
    with pytest.raises(UserError, match="use 'reference' or 'auto'"):
        resolve_backend("fused", "gpu", "float64", CFG, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_canonical_tensors_go_in_and_come_out(tied):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied, num_hidden_layers=12)  # layer 10 after layer 2
    weights = random_weights(cfg, 1)
    back = to_canonical(cfg, from_canonical(cfg, weights))
    assert list(back) == list(tensor_shapes(cfg))
    for name, x in weights.items():
        np.testing.assert_array_equal(back[name], x)
        assert back[name].flags.c_contiguous


def test_loading_copies():
    weights = random_weights(CFG, 1, "float32")
    params = from_canonical(CFG, weights)
    before = np.array(params["model"]["norm"]["weight"])
    weights["model.norm.weight"][:] = 7.0
    np.testing.assert_array_equal(params["model"]["norm"]["weight"], before)


def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, other = (to_canonical(CFG, init_params(CFG, seed)) for seed in (0, 0, 1))
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])
        if "norm" in name:
            assert (x == 1).all()
        else:
            assert not np.array_equal(x, other[name])
            std = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert x.std() == pytest.approx(std, rel=0.1)
    assert not np.array_equal(a["model.layers.0.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])


def test_initial_weights_do_not_come_from_the_module():
    with pytest.raises(UserError, match="init_params\\(cfg, seed\\)"):
        CausalLM(CFG).init(jax.random.key(0), jnp.array(IDS))


def test_equal_models_are_one_compiled_program():
    """Kernels that a run makes anew, as every call of its functions does, must be equal: a closure would
    compile again.
    """
    traces = []

    @partial(jax.jit, static_argnames="model")
    def logits(params, ids, model):
        traces.append(model)
        return model.apply({"params": params}, ids)[0]

    for _ in range(3):
        for settings in (
            {},
            {"attention": "xla", "remat": "full", "scan_layers": True, "loss_chunks": 2, "separator": (1, 2)},
        ):
            logits(init_params(CFG, 0, jnp.float32), jnp.array(IDS), CausalLM(CFG, make_kernels(**settings)))
    assert len(traces) == 2


def test_every_layer_is_seen_under_its_name():
    seen = []

    def spy(f, args, kwargs, context):
        seen.append(context.module.name)
        return f(*args, **kwargs)

    with nn.intercept_methods(spy):
        apply(make_params())
    assert {"layers_0", "layers_1", "self_attn", "q_proj", "mlp", "norm", "lm_head"} <= set(seen)


def test_a_text_past_the_table_is_refused():
    with pytest.raises(UserError, match="the input needs 65 positions but max_position_embeddings = 64"):
        apply(make_params(), np.zeros((1, 65), int))
    with pytest.raises(UserError, match="the KV cache needs 65"):
        init_cache(CFG, 1, 65, jnp.float32)


def test_embedding_gradients_are_summed_in_float32():
    table = jnp.ones((3, 4), jnp.bfloat16)
    ids = jnp.zeros((1, 1000), jnp.int32)
    cotangent = jnp.full((1, 1000, 4), 1.0, jnp.bfloat16)
    gradient = jax.vjp(lambda w: layers.embedding(ids, w), table)[1](cotangent)[0]
    assert gradient[0, 0] == 1000  # a bfloat16 sum stops at 256


def test_the_barrier_of_the_mlp_changes_no_bit():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16)
    plain, apart = (layers.MLP(16, kernels) for kernels in (PLAIN, make_kernels("cudnn")))
    params = plain.init(jax.random.key(1), x)
    loss = lambda mlp: lambda p: jnp.sum(mlp.apply(p, x).astype(jnp.float32) ** 2)
    a, b = (jax.jit(jax.value_and_grad(loss(mlp)))(params) for mlp in (plain, apart))
    assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss(apart)))(params))
    jax.tree.map(np.testing.assert_array_equal, a, b)
