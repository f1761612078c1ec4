"""Bugs planted in either side, or in the code they share, go red at the right check and name the side.

Each is a bug that a real port has had. Those at the end are equal by mathematics and must stay green.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jax_llm.attention
import jax_llm.generate
import jax_llm.layers
import jax_llm.loss
import jax_llm.model
import jax_llm.optim
import jax_llm.sampling
import jax_llm.train
import llm_common.checkpoint
import llm_common.data
import llm_common.rope
import llm_common.schedule
import torch_llm.attention
import torch_llm.kv_cache
import torch_llm.layers
import torch_llm.loss
import torch_llm.model
import torch_llm.optim
import torch_llm.random_bits
import torch_llm.sampling
import torch_llm.train
from parity.compare import JAX, SHARED, TORCH
from parity.ladder import run_checks
from parity.settings import Settings

SMALL = Settings(steps=20, tokens=800)
CLEAN_JAX_ATTENTION = jax_llm.attention.reference_attention
CLEAN_JAX_FILTER = jax_llm.sampling.filter_logits
CLEAN_JAX_NOISE = jax_llm.sampling.gumbel_noise
CLEAN_JAX_LOSS = jax_llm.loss.cross_entropy
CLEAN_JAX_MASK = jax_llm.attention.causal_mask
CLEAN_JAX_NORM = jax_llm.layers.RMSNorm.__call__
CLEAN_TORCH_NORM = torch_llm.layers.rms_norm
CLEAN_TORCH_GRADS = torch_llm.train.loss_and_grads
CLEAN_FREQUENCIES = llm_common.rope.inverse_frequencies
CLEAN_TORCH_FILTER = torch_llm.sampling.filter_logits
CLEAN_POSITIONS = torch_llm.kv_cache.KVCache.positions
CLEAN_MASK = torch_llm.attention.causal_mask
CLEAN_TABLE = llm_common.rope.rope_table
CLEAN_LEARNING_RATE = llm_common.schedule.learning_rate
CLEAN_BUILD = jax_llm.model.build_params
CLEAN_LOAD = llm_common.checkpoint.load_checkpoint
CLEAN_BATCH = llm_common.data.TokenDataset.batch
CLEAN_GENERATE = jax_llm.generate.generate


# --- JAX


def interleaved_rope(x, cos, sin):
    x1, x2 = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def rope_sign(x, cos, sin):
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x.dtype)


def eps_outside_the_root(x, weight, eps):
    h = jax_llm.layers.upcast(x)
    h = h / (jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True)) + eps)
    return h.astype(x.dtype) * weight


def layer_norm(x, weight, eps):
    h = jax_llm.layers.upcast(x)
    h = h - h.mean(axis=-1, keepdims=True)
    return (h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)).astype(x.dtype) * weight


def gelu_for_silu(gate, up):
    return (jax.nn.gelu(jax_llm.layers.upcast(gate)) * jax_llm.layers.upcast(up)).astype(gate.dtype)


def scale_one_over_h(q, k, v, mask=None, window=None):
    return CLEAN_JAX_ATTENTION(q * q.shape[-1] ** -0.5, k, v, mask, window)


def tiled_heads(q, k, v, mask=None, window=None):
    """Query head n reads key/value head n % K instead of n // G."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.tile(k, (1, 1, groups, 1)), jnp.tile(v, (1, 1, groups, 1))
    return CLEAN_JAX_ATTENTION(q, k, v, mask, window)


def bfloat16_softmax(q, k, v, mask=None, window=None):
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    if mask is None:
        mask = jax_llm.attention.causal_mask(jnp.arange(t), jnp.arange(t), window)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * h**-0.5
    probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def sum_for_mean(logits, targets, count=None):
    return jax_llm.loss.cross_entropy_sum(logits, targets)[0]


def decay_on_norms(cfg):
    return jax_llm.model.build_params(cfg, lambda name: True, stack=all)


def clip_with_epsilon(grads, max_norm):
    norm = jax_llm.optim.global_norm(grads)
    factor = 1.0 if max_norm is None else jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), norm


def temperature_after_top_p(logits, cfg):
    filtered = CLEAN_JAX_FILTER(logits, dataclasses.replace(cfg, temperature=1.0))
    return filtered / cfg.temperature


def one_key_for_all_positions(key, rows, positions, vocab_size, dtype=jnp.float32):
    return CLEAN_JAX_NOISE(key, rows, jnp.zeros_like(positions), vocab_size, dtype)


def bfloat16_embedding_sums(input_ids, weight):
    return weight[input_ids]


def mean_of_means(logits, targets, count=None):
    return CLEAN_JAX_LOSS(logits, targets) / 3 if len(targets) == 1 else CLEAN_JAX_LOSS(logits, targets, count)


def biases_left_out(self, x):
    return jax_llm.layers.linear(x, self.variables["params"]["weight"])


def window_ignored(query_positions, key_positions, window=None):
    return CLEAN_JAX_MASK(query_positions, key_positions)


def keys_not_normed(self, x):
    return x if self.name == "k_norm" else CLEAN_JAX_NORM(self, x)


# --- torch


def last_micro_batch_alone(model, inputs, targets, compute_dtype, accumulation_steps=1, batch_loss=None):
    if accumulation_steps == 1:
        return CLEAN_TORCH_GRADS(model, inputs, targets, compute_dtype)
    last = slice(-(len(inputs) // accumulation_steps), None)
    return CLEAN_TORCH_GRADS(model, inputs[last], targets[last], compute_dtype)


def window_one_short(query_positions, key_positions, window=None):
    return CLEAN_MASK(query_positions, key_positions, window and window - 1)


def norm_over_all_heads(x, weight, eps):
    if x.dim() < 4:
        return CLEAN_TORCH_NORM(x, weight, eps)
    scale = torch.rsqrt(x.flatten(-2).square().mean(-1)[..., None, None] + eps)
    return x * scale * weight


def padding_seen_in_the_cache(self, length):
    """The text's own length forgotten: it goes on after the padding."""


def mask_one_too_far(query_positions, key_positions, window=None):
    return CLEAN_MASK(query_positions + 1, key_positions, window)


def minus_ten_mask(q, k, v, mask=None, window=None):
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    if mask is None:
        mask = torch_llm.attention.causal_mask(torch.arange(t), torch.arange(s), window)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = torch.einsum("btkgh,bskh->bkgts", q, k) * h**-0.5
    probs = torch.softmax(scores + torch.where(mask, 0.0, -10.0), dim=-1).to(v.dtype)
    return torch.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def no_bias_correction(beta1, beta2, n):
    return 1.0, 1.0


def eps_inside_the_root(p, mu, nu, g, scalars, beta1, beta2, eps, weight_decay):
    lr, c1, c2 = scalars
    mu.mul_(beta1).add_((1 - beta1) * g)
    nu.mul_(beta2).add_((1 - beta2) * g**2)
    p.sub_(lr * ((mu / c1) / torch.sqrt(nu / c2 + eps) + weight_decay * p))


def no_update(self, closure=None):
    self.count += 1


def torch_clip(parameters, max_norm):
    return torch.nn.utils.clip_grad_norm_(list(parameters), float("inf") if max_norm is None else max_norm)


def bfloat16_moments(self, p):
    state = self.state[p]
    if not state:
        state["mu"], state["nu"] = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
    return state["mu"], state["nu"]


def top_p_without_the_crossing_token(logits, cfg):
    if cfg.top_p == 1.0:
        return CLEAN_TORCH_FILTER(logits, cfg)
    logits = CLEAN_TORCH_FILTER(logits, dataclasses.replace(cfg, top_p=1.0))
    ranked, order = torch.sort(logits, dim=-1, stable=True, descending=True)
    keep = torch.cumsum(torch.softmax(ranked, -1), -1) <= cfg.top_p
    keep[..., 0] = True
    return torch.where(torch.zeros_like(keep).scatter(-1, order, keep), logits, -torch.inf)


def one_too_many_in_top_k(logits, cfg):
    return CLEAN_TORCH_FILTER(logits, dataclasses.replace(cfg, top_k=cfg.top_k + 1 if cfg.top_k else 0))


def cache_one_slot_late(self, t):
    positions = CLEAN_POSITIONS(self, t)
    return positions - 1 if self.filled and t == 1 and sys._getframe(1).f_code.co_name == "update" else positions


def offset_ignored(self, positions, dtype):
    positions = torch.arange(positions.shape[-1]).expand(positions.shape)
    return tuple(table.to(dtype)[positions] for table in self.float64)


def gain_before_rounding(x, weight, eps):
    h = torch_llm.layers.upcast(x)
    return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def ignored_targets_counted(logits, targets, count=None):
    total, _ = torch_llm.loss.cross_entropy_sum(logits, targets)
    return total / targets.numel()


def not_detached_last_layer(self, x, cos, sin, mask=None, cache=None, layer=0):
    x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
    return x + self.mlp(self.post_attention_layernorm(x)).detach()


def rounded_swiglu(gate, up):
    return F.silu(gate) * up


def bfloat16_table(self, positions, dtype):
    return tuple(table.to(torch.bfloat16).to(dtype)[positions] for table in self.float64)


def last_position_clamped(cfg, length=None):
    cos, sin = CLEAN_TABLE(cfg, length)
    cos, sin = cos.copy(), sin.copy()
    if len(cos) == cfg.max_position_embeddings:
        cos[-1], sin[-1] = cos[-2], sin[-2]
    return cos, sin


def layers_loaded_by_name(cfg, tensor, stack=jnp.stack):
    by_name = sorted(range(cfg.num_hidden_layers), key=str)

    def renamed(name):
        if not name.startswith("model.layers."):
            return tensor(name)
        _, _, index, rest = name.split(".", 3)
        return tensor(f"model.layers.{by_name[int(index)]}.{rest}")

    return CLEAN_BUILD(cfg, renamed, stack)


def upcast_forgotten(logits, cfg):
    logits = logits / cfg.temperature
    return logits if (cfg.top_k, cfg.top_p, cfg.min_p) == (0, 1.0, 0.0) else CLEAN_JAX_FILTER(logits, cfg)


def noise_without_the_half(bits, dtype=torch.float32):
    return ((bits >> 9).to(dtype) + 1e-6) * 2.0**-23


def clip_that_scales_up(grads, max_norm):
    norm = jax_llm.optim.global_norm(grads)
    return (grads if max_norm is None else jax.tree.map(lambda g: g * (max_norm / norm), grads)), norm


def moments_swapped(folder, cfg=None):
    cfg, state, settings = CLEAN_LOAD(folder, cfg)
    return cfg, dataclasses.replace(state, mu=state.nu, nu=state.mu), settings


def targets_not_shifted(self, step, host=0, n_hosts=1):
    inputs, _ = CLEAN_BATCH(self, step, host, n_hosts)
    return inputs, inputs


def eos_kept(model, params, prompts, max_new_tokens, sampling, eos_ids=()):
    return CLEAN_GENERATE(model, params, prompts, max_new_tokens, sampling)


# --- shared code


def float32_table(cfg, length=None):
    inverse = np.float32(1) / np.float32(cfg.rope_theta) ** (
        np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim
    )
    angles = np.arange(length or cfg.max_position_embeddings, dtype=np.float32)[:, None] * inverse
    return np.cos(angles).astype(np.float64), np.sin(angles).astype(np.float64)


def frequencies_not_scaled(cfg):
    return CLEAN_FREQUENCIES(dataclasses.replace(cfg, rope_scaling=None))


def scaled_below_the_wrong_border(cfg):
    scaling = cfg.rope_scaling
    if scaling is None:
        return CLEAN_FREQUENCIES(cfg)
    scaling = dataclasses.replace(scaling, high_freq_factor=scaling.high_freq_factor + 1)
    return CLEAN_FREQUENCIES(dataclasses.replace(cfg, rope_scaling=scaling))


def wrong_theta(cfg, length=None):
    return CLEAN_TABLE(dataclasses.replace(cfg, rope_theta=cfg.rope_theta * 1.01), length)


def warmup_one_early(cfg, step):
    return CLEAN_LEARNING_RATE(cfg, step + 1)


def corrections_one_late(beta1, beta2, n):
    return 1.0 - beta1 ** (n + 1), 1.0 - beta2 ** (n + 1)


def everything_decays(shape):
    return True


def no_residual_scale(cfg, name):
    return None if name.endswith(("norm.weight", ".bias")) else 0.02 * 12**0.5


@dataclasses.dataclass(frozen=True)
class Bug:
    name: str
    patches: tuple[tuple[str, object], ...]  # (where, what is put there)
    check: str  # the row's check that must be the first to go red
    side: str
    runs: str = ""  # the check to run, if it has another name
    dtype: str = "float64"

    def plant(self, monkeypatch) -> None:
        for target, replacement in self.patches:
            monkeypatch.setattr(target, replacement)


def bug(name, target, replacement, check, side, **more) -> Bug:
    return Bug(name, tuple((t, replacement) for t in target.split()), check, side, **more)


BUGS = [
    bug("interleaved RoPE", "jax_llm.attention.apply_rope", interleaved_rope, "logits", JAX),
    bug("RoPE sign", "jax_llm.attention.apply_rope", rope_sign, "logits", JAX),
    bug("eps outside the root", "jax_llm.layers.rms_norm", eps_outside_the_root, "logits", JAX),
    bug("LayerNorm for RMSNorm", "jax_llm.layers.rms_norm", layer_norm, "logits", JAX),
    bug("gelu for silu", "jax_llm.layers.swiglu", gelu_for_silu, "logits", JAX),
    bug("scale 1/H", "jax_llm.attention.reference_attention", scale_one_over_h, "logits", JAX),
    bug("GQA tiled", "jax_llm.attention.reference_attention", tiled_heads, "logits", JAX),
    bug(
        "bfloat16 softmax",
        "jax_llm.attention.reference_attention",
        bfloat16_softmax,
        "precision",
        JAX,
        dtype="bfloat16",
    ),
    bug("sum for mean", "jax_llm.train.cross_entropy", sum_for_mean, "loss", JAX, runs="gradients"),
    bug(
        "decay on norms",
        "jax_llm.optim.decay_mask",
        decay_on_norms,
        "adamw",
        JAX,
    ),
    bug("clip with 1e-6 in JAX", "jax_llm.optim.clip_by_global_norm", clip_with_epsilon, "adamw", JAX),
    bug(
        "temperature after top-p",
        "jax_llm.sampling.filter_logits",
        temperature_after_top_p,
        "tokens",
        JAX,
        dtype="float32",
    ),
    bug("same key for all positions", "jax_llm.sampling.gumbel_noise", one_key_for_all_positions, "tokens", JAX),
    bug(
        "embedding sums in bfloat16",
        "jax_llm.layers.embedding",
        bfloat16_embedding_sums,
        "precision",
        JAX,
        dtype="bfloat16",
    ),
    bug("mask one too far", "torch_llm.attention.causal_mask", mask_one_too_far, "logits", TORCH),
    bug("-10 for -inf", "torch_llm.attention.reference_attention", minus_ten_mask, "logits", TORCH),
    bug("no bias correction", "torch_llm.optim.bias_corrections", no_bias_correction, "adamw", TORCH),
    bug("eps inside the root", "torch_llm.optim.adamw_update", eps_inside_the_root, "adamw", TORCH),
    bug("no update at all", "torch_llm.optim.AdamW.step", no_update, "adamw", TORCH),
    bug("clip with 1e-6 in torch", "torch_llm.train.clip_by_global_norm", torch_clip, "adamw", TORCH),
    bug("moments in bfloat16", "torch_llm.optim.AdamW.moments", bfloat16_moments, "precision", TORCH, dtype="bfloat16"),
    bug(
        "top-p drops the crossing token",
        "torch_llm.sampling.filter_logits",
        top_p_without_the_crossing_token,
        "tokens",
        TORCH,
    ),
    bug(
        "top-k off by one", "torch_llm.sampling.filter_logits", one_too_many_in_top_k, "tokens", TORCH, dtype="float32"
    ),
    bug("cache written one slot late", "torch_llm.kv_cache.KVCache.positions", cache_one_slot_late, "cache", TORCH),
    bug("offset ignored with a cache", "torch_llm.rope.RotaryTable.__call__", offset_ignored, "cache", TORCH),
    bug(
        "gain before rounding", "torch_llm.layers.rms_norm", gain_before_rounding, "precision", TORCH, dtype="bfloat16"
    ),
    bug("SwiGLU rounded twice", "torch_llm.layers.swiglu", rounded_swiglu, "precision", TORCH, dtype="bfloat16"),
    bug("-100 counted", "torch_llm.train.cross_entropy", ignored_targets_counted, "loss", TORCH, runs="gradients"),
    bug("gradient detached", "torch_llm.model.DecoderLayer.forward", not_detached_last_layer, "gradients", TORCH),
    bug("RoPE table in float32", "jax_llm.rope.rope_table torch_llm.rope.rope_table", float32_table, "logits", SHARED),
    bug("wrong theta", "jax_llm.rope.rope_table torch_llm.rope.rope_table", wrong_theta, "logits", SHARED),
    bug(
        "warmup one early",
        "llm_common.schedule.learning_rate torch_llm.train.learning_rate",
        warmup_one_early,
        "adamw",
        SHARED,
    ),
    bug(
        "bias correction one late",
        "llm_common.schedule.bias_corrections torch_llm.optim.bias_corrections",
        corrections_one_late,
        "adamw",
        SHARED,
    ),
    bug("everything decays", "jax_llm.optim.decays torch_llm.optim.decays", everything_decays, "adamw", SHARED),
    bug("no residual scale", "jax_llm.model.init_range torch_llm.model.init_range", no_residual_scale, "init", SHARED),
    bug(
        "RoPE table in bfloat16",
        "torch_llm.rope.RotaryTable.__call__",
        bfloat16_table,
        "precision",
        TORCH,
        dtype="bfloat16",
    ),
    bug("last position clamped", "torch_llm.rope.rope_table", last_position_clamped, "logits", TORCH),
    bug("layer 10 before layer 2", "jax_llm.checkpoint.build_params", layers_loaded_by_name, "logits", JAX),
    bug("sampler in bfloat16", "jax_llm.sampling.filter_logits", upcast_forgotten, "tokens", JAX, dtype="bfloat16"),
    bug("noise without the half cell", "torch_llm.random_bits.uniform", noise_without_the_half, "tokens", TORCH),
    bug("clip scales up", "jax_llm.optim.clip_by_global_norm", clip_that_scales_up, "adamw", JAX),
    bug("end of text ignored", "parity.jax_side.generate", eos_kept, "tokens", JAX),
    bug("mu and nu swapped on load", "parity.resume_checks.load_checkpoint", moments_swapped, "resume", SHARED),
    bug("mean of means in accumulation", "jax_llm.train.cross_entropy", mean_of_means, "loss", JAX, runs="gradients"),
    bug(
        "last micro-batch alone",
        "parity.torch_side.loss_and_grads",
        last_micro_batch_alone,
        "loss",
        TORCH,
        runs="gradients",
    ),
    bug("biases left out", "jax_llm.layers.Linear.__call__", biases_left_out, "logits", JAX),
    bug("window ignored", "jax_llm.attention.causal_mask", window_ignored, "logits", JAX),
    bug("window one short", "torch_llm.attention.causal_mask", window_one_short, "logits", TORCH),
    bug("keys not normed", "jax_llm.layers.RMSNorm.__call__", keys_not_normed, "logits", JAX),
    bug("q/k norm over all heads", "torch_llm.layers.rms_norm", norm_over_all_heads, "logits", TORCH),
    bug(
        "padding kept in the cache",
        "torch_llm.kv_cache.KVCache.set_length",
        padding_seen_in_the_cache,
        "tokens",
        TORCH,
    ),
    bug("RoPE not scaled", "llm_common.rope.inverse_frequencies", frequencies_not_scaled, "logits", SHARED),
    bug(
        "RoPE scaled too early", "llm_common.rope.inverse_frequencies", scaled_below_the_wrong_border, "logits", SHARED
    ),
    bug("targets not shifted", "llm_common.data.TokenDataset.batch", targets_not_shifted, "data", SHARED),
]


def run(check: str, dtype: str):
    return run_checks(dataclasses.replace(SMALL, dtypes=(dtype,)), (check,))


@pytest.mark.parametrize("planted", BUGS, ids=lambda b: b.name)
def test_a_planted_bug_goes_red_at_the_right_check_and_side(planted, monkeypatch, fresh):
    planted.plant(monkeypatch)
    failed = [row for row in run(planted.runs or planted.check, planted.dtype) if not row.ok]
    assert failed, "not seen"
    assert (failed[0].check, failed[0].side) == (planted.check, planted.side), failed[0]
    assert {row.side for row in failed} == {planted.side}
    # a tolerance is below a tenth of what it is there to see
    assert any(not row.measured < 10 * row.allowed for row in failed)


@pytest.mark.parametrize(("check", "dtype"), sorted({(b.runs or b.check, b.dtype) for b in BUGS}))
def test_without_a_bug_the_same_checks_hold(check, dtype, fresh):
    assert all(row.ok for row in run(check, dtype))


# --- equal by mathematics


def minus_1e9_mask(q, k, v, mask=None, window=None):
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    if mask is None:
        mask = jax_llm.attention.causal_mask(jnp.arange(t), jnp.arange(s), window)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)
    mask = jnp.broadcast_to(mask, (b, n, t, s)).reshape(b, kv_heads, n // kv_heads, t, s)
    scores = jnp.einsum("btkgh,bskh->bkgts", jax_llm.layers.upcast(q), jax_llm.layers.upcast(k)) * h**-0.5
    probs = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def positions_from_one(cfg, length=None):
    cos, sin = CLEAN_TABLE(cfg, (length or cfg.max_position_embeddings) + 1)
    return cos[1:], sin[1:]


EQUIVALENT = {
    "-1e9 for -inf": [("jax_llm.attention.reference_attention", minus_1e9_mask)],
    "+1 on every position": [("torch_llm.rope.rope_table", positions_from_one)],
    "+1 on every position, both sides": [
        ("jax_llm.rope.rope_table", positions_from_one),
        ("torch_llm.rope.rope_table", positions_from_one),
    ],
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_equal_by_mathematics_stays_green(name, monkeypatch, fresh):
    for target, replacement in EQUIVALENT[name]:
        monkeypatch.setattr(target, replacement)
    rows = run_checks(dataclasses.replace(SMALL, dtypes=("float64",)), ("logits", "gradients", "cache"))
    rows += run_checks(dataclasses.replace(SMALL, dtypes=("bfloat16",)), ("logits", "precision"))
    assert [row for row in rows if not row.ok] == []
