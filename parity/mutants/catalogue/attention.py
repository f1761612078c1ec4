"""Planted bugs of RoPE and attention."""

from parity.mutants.catalogue.mutant import ATTENTION, LAYER, area, both, jax, same_edit, shared, torch

# --- rotary positions
area("RoPE")
CAT_J = "jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)"
CAT_T = "torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)"
ROPE_Q = f"{ATTENTION}.apply_rope(q)"
jax(
    "pairs interleaved, results concatenated",
    "rope:apply_rope",
    "jnp.split(upcast(x), 2, axis=-1)",
    "(upcast(x)[..., ::2], upcast(x)[..., 1::2])",
    place=ROPE_Q,
    quick=True,
)
torch(
    "interleaved convention",
    "rope:apply_rope",
    "x1, x2 = torch.chunk(upcast(x), 2, dim=-1)\n",
    "x1, x2 = upcast(x)[..., ::2], upcast(x)[..., 1::2]\n"
    "c, s = cos[..., None, :], sin[..., None, :]\n"
    "return torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], -1).flatten(-2).to(x.dtype)",
    place=ROPE_Q,
)
jax(
    "sign of the sine",
    "rope:apply_rope",
    CAT_J,
    "jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)",
    place=ROPE_Q,
)
torch(
    "one sign of the sine",
    "rope:apply_rope",
    CAT_T,
    "torch.cat([x1 * cos - x2 * sin, x2 * cos - x1 * sin], dim=-1)",
    place=ROPE_Q,
)
torch(
    "no rotation of k",
    "attention:Attention.forward",
    "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)",
    "q = apply_rope(q, place.cos, place.sin)",
    place=ATTENTION,
)
jax(
    "no rotation of q",
    "attention:Attention.__call__",
    "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)",
    "k = apply_rope(k, place.cos, place.sin)",
    place=ATTENTION,
)
jax(
    "only half of the width is rotated",
    "rope:apply_rope",
    "return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)",
    "h = x1.shape[-1] // 2\n"
    "y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin\n"
    "y1, y2 = y1.at[..., h:].set(x1[..., h:]), y2.at[..., h:].set(x2[..., h:])\n"
    "return jnp.concatenate([y1, y2], axis=-1).astype(x.dtype)",
    place=ROPE_Q,
)
torch(
    "q one position ahead of k",
    "attention:Attention.forward",
    "apply_rope(q, place.cos, place.sin)",
    "apply_rope(q, torch.roll(place.cos, 1, 0), torch.roll(place.sin, 1, 0))",
    place="rotary table",
)
torch(
    "table in bfloat16",
    "rope:RotaryTable.__call__",
    "[table.to(dtype).to(device) for table in self.float64]",
    "[table.to(torch.bfloat16).to(dtype).to(device) for table in self.float64]",
    "precision",
    "rotary table",
    dtype="bfloat16",
)
jax(
    "table in float32 in a float64 run",
    "rope:rotary_table",
    "jnp.asarray(cos, dtype)",
    "jnp.asarray(cos.astype('float32'), dtype)",
    place="rotary table",
)
shared(
    "table in float32",
    "rope:rope_table",
    "np.arange(length, dtype=np.float64)[:, None] * inverse_frequencies(cfg)",
    "(np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(cfg).astype(np.float32))",
    "logits",
    "rotary table",
    quick=True,
)
shared(
    "wrong theta",
    "rope:inverse_frequencies",
    "np.float64(cfg.rope_theta)",
    "np.float64(1.01 * cfg.rope_theta)",
    "logits",
    "rotary table",
)
shared(
    "exponents up to 1",
    "rope:inverse_frequencies",
    "np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim",
    "np.arange(0, cfg.head_dim, 2, dtype=np.float64) / (cfg.head_dim - 2)",
    "logits",
    "rotary table",
)
shared(
    "frequencies rounded before the phase",
    "rope:rope_table",
    "inverse_frequencies(cfg)",
    "inverse_frequencies(cfg).astype(np.float32)",
    "logits",
    "rotary table",
)
shared(
    "last position clamped",
    "rope:rope_table",
    "np.arange(length, dtype=np.float64)[:, None]",
    "np.minimum(np.arange(length), cfg.max_position_embeddings - 2)[:, None]",
    "logits",
    "rotary table",
)
shared(
    "cos and sin swapped",
    "rope:rope_table",
    "(np.cos(angles), np.sin(angles))",
    "(np.sin(angles), np.cos(angles))",
    "logits",
    "rotary table",
)
shared(
    "degrees for radians",
    "rope:rope_table",
    "np.cos(angles), np.sin(angles)",
    "np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))",
    "logits",
    "rotary table",
)
shared("scaling left out", "rope:inverse_frequencies", "scaling is None", "True", "logits", "rotary table", quick=True)
shared(
    "scaling begins at the wrong border",
    "rope:inverse_frequencies",
    "(turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)",
    "(turns - scaling.low_freq_factor) / (scaling.high_freq_factor + 1 - scaling.low_freq_factor)",
    "logits",
    "rotary table",
)
shared(
    "scaling multiplies",
    "rope:inverse_frequencies",
    "(1.0 - kept) * frequencies / scaling.factor",
    "(1.0 - kept) * frequencies * scaling.factor",
    "logits",
    "rotary table",
)
shared(
    "scaling not clipped",
    "rope:inverse_frequencies",
    "kept = np.clip(kept, 0.0, 1.0)",
    "kept = np.maximum(kept, 0.0)",
    "logits",
    "rotary table",
)
shared(
    "wavelength without 2 pi",
    "rope:inverse_frequencies",
    "scaling.original_max_position_embeddings * frequencies / (2 * np.pi)",
    "scaling.original_max_position_embeddings * frequencies / np.pi",
    "logits",
    "rotary table",
)
both(
    "rotation in bfloat16",
    (
        "rope:apply_rope",
        "cos, sin = cos[..., None, :], sin[..., None, :]",
        "x1, x2, cos, sin = x1.astype(x.dtype), x2.astype(x.dtype), cos[..., None, :].astype(x.dtype), sin[..., "
        "None, :].astype(x.dtype)",
    ),
    (
        "rope:apply_rope",
        "cos, sin = cos[..., None, :], sin[..., None, :]",
        "x1, x2, cos, sin = x1.to(x.dtype), x2.to(x.dtype), cos[..., None, :].to(x.dtype), sin[..., None, "
        ":].to(x.dtype)",
    ),
    "precision",
    "apply_rope",
    dtype="bfloat16",
)

# --- attention
area("attention")
CORE = f"{ATTENTION}.attention"
SCORES_T = 'torch.einsum("btkgh,bskh->bkgts", upcast(q), upcast(k)) * h**-0.5'
REF = "attention:reference_attention"
jax("scale 1/H", REF, "h**-0.5", "h**-1.0", place=CORE)
torch("no scale", REF, "h**-0.5", "1.0", place=CORE)
same_edit("scale of the whole width", REF, "h**-0.5", "(n * h)**-0.5", place=CORE)
torch(
    "mask sees one position ahead",
    "attention:causal_mask",
    "query_positions[..., :, None] - key_positions",
    "query_positions[..., :, None] + 1 - key_positions",
    place=CORE,
)
same_edit(
    "no causal mask",
    REF,
    "mask is None",
    "mask is None and not (mask := xp.ones((t, s), dtype=bool)).all()",
    place=CORE,
)
torch(
    "-10 for -inf", REF, "torch.where(mask, scores, -torch.inf)", "torch.where(mask, scores, scores - 10.0)", place=CORE
)
both(
    "-20 for -inf",
    (REF, "jnp.where(mask, scores, -jnp.inf)", "jnp.where(mask, scores, -20.0)"),
    (REF, "torch.where(mask, scores, -torch.inf)", "torch.where(mask, scores, -20.0)"),
    place=CORE,
)
jax("softmax over the queries", REF, "jax.nn.softmax(scores, axis=-1)", "jax.nn.softmax(scores, axis=-2)", place=CORE)
jax(
    "softmax in bfloat16",
    REF,
    'jnp.einsum("btkgh,bskh->bkgts", upcast(q), upcast(k))',
    'jnp.einsum("btkgh,bskh->bkgts", q, k)',
    "precision",
    "attention",
    dtype="bfloat16",
    quick=True,
)
torch("scores in float32 in a float64 run", REF, "upcast(q)", "q.float().double()", place=CORE)
same_edit(
    "probabilities not over the keys seen",
    REF,
    "mask = xp.broadcast_to(mask, (b, n, t, s)).reshape(scores.shape)",
    "mask = xp.broadcast_to(mask, (b, n, t, s)).reshape(scores.shape)\nscores = scores - xp.log(xp.ones_like(scores) "
    "* 1.5) * (scores > 0)",
    place=CORE,
)
jax(
    "GQA: query head n reads head n % K",
    REF,
    "q = q.reshape(b, t, kv_heads, n // kv_heads, h)",
    "q = q.reshape(b, t, n // kv_heads, kv_heads, h).swapaxes(2, 3)",
    place=CORE,
)
torch(
    "GQA: all heads read the first",
    REF,
    'torch.einsum("bkgts,bskh->btkgh", probs, v)',
    'torch.einsum("bkgts,bskh->btkgh", probs, v[:, :, :1].expand(v.shape))',
    place=CORE,
)
same_edit(
    "GQA: groups of the wrong size",
    REF,
    "return xp.einsum('bkgts,bskh->btkgh', probs, v).reshape(b, t, n, h)",
    "return xp.einsum('bkgts,bskh->btgkh', probs, v).reshape(b, t, n, h)",
    place=CORE,
)
jax(
    "heads not put back before o_proj",
    "attention:Attention.__call__",
    "out.reshape(b, t, -1)",
    "out.swapaxes(2, 3).reshape(b, t, -1)",
    place=ATTENTION,
)
torch(
    "width split before heads",
    "attention:project_qkv",
    "attention.q_proj(x).reshape(b, t, -1, attention.cfg.head_dim)",
    "attention.q_proj(x).reshape(b, t, attention.cfg.head_dim, -1).transpose(2, 3)",
    place=ATTENTION,
)
jax(
    "k and v swapped",
    "attention:Attention.__call__",
    "kernels.attention(q, k, v, place.mask, place.window)",
    "kernels.attention(q, v, k, place.mask, place.window)",
    place=ATTENTION,
)
torch(
    "q from the residual stream",
    "model:DecoderLayer.forward",
    "self.self_attn(self.input_layernorm(x), place, cache, layer)",
    "self.self_attn(self.input_layernorm(x) + 0.01 * x, place, cache, layer)",
    place=LAYER,
)
jax("window ignored", "attention:causal_mask", "window is None", "True", place=CORE)
torch("window one short", "attention:causal_mask", "distance < window", "distance < window - 1", place=CORE)
same_edit("window one long", "attention:causal_mask", "distance < window", "distance <= window", place=CORE)
jax("biases left out", "layers:Linear.__call__", "self.use_bias", "False", place=f"{ATTENTION}.q_proj")
torch(
    "bias subtracted",
    "layers:Linear.forward",
    "out + self.bias",
    "out - self.bias",
    place=f"{ATTENTION}.q_proj",
)
jax(
    "k not normed",
    "attention:Attention.__call__",
    'k = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="k_norm")(k)',
    'RMSNorm(cfg.rms_norm_eps, kernels.norm, name="k_norm")(k)',
    place=ATTENTION,
)
torch(
    "norm over all heads",
    "attention:Attention.forward",
    "q, k = self.q_norm(q), self.k_norm(k)",
    "q = q * torch.rsqrt(q.flatten(-2).square().mean(-1)[..., None, None] + 1e-5) * self.q_norm.weight\nk = "
    "self.k_norm(k)",
    place=ATTENTION,
)
both(
    "q and k normed after the rotation",
    (
        "attention:Attention.__call__",
        "if cfg.qk_norm:\n"
        '    q = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="q_norm")(q)\n'
        '    k = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="k_norm")(k)\n'
        "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)",
        "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)\n"
        "if cfg.qk_norm:\n"
        '    q = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="q_norm")(q)\n'
        '    k = RMSNorm(cfg.rms_norm_eps, kernels.norm, name="k_norm")(k)',
    ),
    (
        "attention:Attention.forward",
        "if self.cfg.qk_norm:\n"
        "    q, k = self.q_norm(q), self.k_norm(k)\n"
        "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)",
        "q, k = apply_rope(q, place.cos, place.sin), apply_rope(k, place.cos, place.sin)\n"
        "if self.cfg.qk_norm:\n"
        "    q, k = self.q_norm(q), self.k_norm(k)",
    ),
    place=ATTENTION,
)

# --- the other ways to run the same model
area("variants")
torch(
    "fused attention: window one long",
    "fast.attention:fused_attention",
    "causal_mask(positions, positions, window)",
    "causal_mask(positions, positions, window + 1)",
    "noise",
)
jax(
    "fused attention: window one long",
    "fast.attention:fused_attention",
    "(window - 1, 0)",
    "(window, 0)",
    "noise",
    dtype="float32",
)
jax(
    "scanned layers add their input twice",
    "fast.layers:Layers.__call__",
    "(apply('all', weights, x, None)[0], None)",
    "(x + apply('all', weights, x, None)[0], None)",
    "noise",
)
