"""Edits that are equal by mathematics and must stay green."""

from parity.mutants.catalogue.mutant import equivalent

SCORES_T = 'torch.einsum("btkgh,bskh->bkgts", upcast(q), upcast(k)) * h**-0.5'
# --- equal by mathematics
equivalent(
    "-1e9 for -inf",
    ("jax_llm.attention:reference_attention", "jnp.where(mask, scores, -jnp.inf)", "jnp.where(mask, scores, -1e9)"),
)
equivalent(
    "-1e9 for -inf, torch",
    (
        "torch_llm.attention:reference_attention",
        "torch.where(mask, scores, -torch.inf)",
        "torch.where(mask, scores, -1e9)",
    ),
)
equivalent(
    "+1 on every position",
    (
        "llm_common.rope:rope_table",
        "np.arange(length, dtype=np.float64)[:, None]",
        "(1 + np.arange(length, dtype=np.float64))[:, None]",
    ),
)
equivalent(
    "+1 on every position, torch",
    (
        "torch_llm.rope:RotaryTable.__init__",
        "rope_table(cfg)",
        "(x[1:] for x in rope_table(cfg, cfg.max_position_embeddings + 1))",
    ),
)
equivalent(
    "scale on q",
    (
        "torch_llm.attention:reference_attention",
        SCORES_T,
        'torch.einsum("btkgh,bskh->bkgts", upcast(q) * h**-0.5, upcast(k))',
    ),
)
equivalent(
    "1 / sqrt for rsqrt",
    (
        "torch_llm.layers:rms_norm",
        "torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + eps)",
        "1 / torch.sqrt(torch.mean(h * h, dim=-1, keepdim=True) + eps)",
    ),
)
equivalent(
    "silu written out",
    ("jax_llm.layers:swiglu", "jax.nn.silu(upcast(gate))", "upcast(gate) / (1 + jnp.exp(-upcast(gate)))"),
)
equivalent(
    "up times silu(gate)",
    ("torch_llm.layers:swiglu", "F.silu(upcast(gate)) * upcast(up)", "upcast(up) * F.silu(upcast(gate))"),
)
equivalent(
    "matmul for einsum",
    ("jax_llm.fast.products:flat_linear", 'jnp.einsum("...d,fd->...f", rows, weight)', "(rows @ weight.T)"),
)
equivalent(
    "keys repeated instead of queries grouped",
    (
        "torch_llm.attention:reference_attention",
        'torch.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)',
        'torch.einsum("bnts,bsnh->btnh", probs.reshape(b, n, t, s), v.repeat_interleave(n // kv_heads, 2))',
    ),
)
equivalent(
    "log of softmax",
    (
        "jax_llm.loss:cross_entropy_sum",
        "jax.nn.logsumexp(logits, axis=-1) - picked",
        "-jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), safe[..., None], axis=-1)[..., 0]",
    ),
)
equivalent(
    "decay in the form of torch",
    (
        "torch_llm.optim:adamw_update",
        "p.sub_(lr * (direction + weight_decay * p))",
        "p.mul_(1 - lr * weight_decay)\np.sub_(lr * direction)",
    ),
    check="training",
)
equivalent(
    "moment as a lerp",
    ("torch_llm.optim:adamw_update", "mu.mul_(beta1).add_((1.0 - beta1) * g)", "mu.lerp_(g, 1.0 - beta1)"),
    check="training",
)
equivalent(
    "cosine as a square",
    (
        "llm_common.schedule:learning_rate",
        "0.5 * (1.0 + math.cos(math.pi * progress))",
        "math.cos(0.5 * math.pi * progress) ** 2",
    ),
    check="training",
)
equivalent(
    "clip by a condition",
    (
        "jax_llm.optim:clip_factor",
        "jnp.minimum(1.0, max_norm / norm)",
        "jnp.where(norm > max_norm, max_norm / norm, 1.0)",
    ),
    check="training",
)
equivalent(
    "order by the negative",
    (
        "jax_llm.sampling:filter_logits",
        "jnp.argsort(logits, axis=-1, stable=True, descending=True)",
        "jnp.argsort(-logits, axis=-1, stable=True)",
    ),
    check="sampler",
)
equivalent(
    "residual added from the left",
    (
        "torch_llm.model:DecoderLayer.forward",
        "x + self.mlp(self.post_attention_layernorm(x))",
        "self.mlp(self.post_attention_layernorm(x)) + x",
    ),
)
equivalent(
    "mask by positions compared",
    (
        "torch_llm.attention:causal_mask",
        "distance >= 0 if window is None else (distance >= 0) & (distance < window)",
        "distance > -1 if window is None else ~((distance < 0) | (distance > window - 1))",
    ),
)
