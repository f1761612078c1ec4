"""Planted bugs of norms, MLP, residual stream, embedding and head."""

from parity.core.compare import BOTH
from parity.mutants.catalogue.mutant import LAYER, area, both, jax, same_edit, torch

# --- norms
area("norm")
NORM = "layers:rms_norm"
FIRST_NORM = f"{LAYER}.input_layernorm"
jax(
    "eps outside the root",
    NORM,
    "jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)",
    "1 / (jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True)) + eps)",
    place=FIRST_NORM,
    quick=True,
)
torch(
    "eps 1e-6",
    NORM,
    "torch.mean(h * h, dim=-1, keepdim=True) + eps",
    "torch.mean(h * h, dim=-1, keepdim=True) + 1e-6",
    place=FIRST_NORM,
)
same_edit("no eps", NORM, "eps", "0.0", place=FIRST_NORM)
jax(
    "n - 1 in the mean",
    NORM,
    "jnp.mean(h * h, axis=-1, keepdims=True)",
    "jnp.sum(h * h, axis=-1, keepdims=True) / (h.shape[-1] - 1)",
    place=FIRST_NORM,
)
torch("gain 1 + w", NORM, "h.to(x.dtype) * weight", "h.to(x.dtype) * (1 + weight)", place=FIRST_NORM)
both(
    "LayerNorm's centring",
    (NORM, "h = upcast(x)", "h = upcast(x) - upcast(x).mean(-1, keepdims=True)"),
    (NORM, "h = upcast(x)", "h = upcast(x) - upcast(x).mean(-1, keepdim=True)"),
    place=FIRST_NORM,
)
torch(
    "gain before the rounding",
    NORM,
    "h.to(x.dtype) * weight",
    "(h * weight).to(x.dtype)",
    "precision",
    "rms_norm",
    dtype="bfloat16",
)
same_edit("statistics in bfloat16", NORM, "upcast(x)", "x", "precision", "rms_norm", dtype="bfloat16", side=BOTH)
jax(
    "norm after the block instead of before",
    "model:DecoderLayer.__call__",
    'h = RMSNorm(eps, kernels.norm, name="post_attention_layernorm")(x)\n'
    'return x + MLP(self.cfg.intermediate_size, kernels, name="mlp")(h), cache',
    'h = MLP(self.cfg.intermediate_size, kernels, name="mlp")(x)\n'
    'return x + RMSNorm(eps, kernels.norm, name="post_attention_layernorm")(h), cache',
    place=LAYER,
)
torch(
    "no norm before the MLP",
    "model:DecoderLayer.forward",
    "self.mlp(self.post_attention_layernorm(x))",
    "self.mlp(x)",
    place=LAYER,
)
torch("no final norm", "model:Transformer.forward", "self.norm(x)", "x", place="model")
jax("norm of a norm", "model:Transformer.__call__", "self.norm(x)", "self.norm(self.norm(x))", place="model")

# --- MLP and residual stream
area("MLP")
SWIGLU = f"{LAYER}.mlp.swiglu"
jax(
    "gate and up swapped",
    "layers:MLP.__call__",
    "self.kernels.activation(gate, up)",
    "self.kernels.activation(up, gate)",
    place=f"{LAYER}.mlp",
    quick=True,
)
torch("gelu for silu", "layers:swiglu", "F.silu(upcast(gate))", "F.gelu(upcast(gate))", place=SWIGLU)
jax("relu for silu", "layers:swiglu", "jax.nn.silu(upcast(gate))", "jax.nn.relu(upcast(gate))", place=SWIGLU)
both(
    "tanh gelu for silu",
    ("layers:swiglu", "jax.nn.silu(upcast(gate))", "jax.nn.gelu(upcast(gate))"),
    ("layers:swiglu", "F.silu(upcast(gate))", 'F.gelu(upcast(gate), approximate="tanh")'),
    place=SWIGLU,
)
both(
    "quick gelu for silu",
    ("layers:swiglu", "jax.nn.silu(upcast(gate))", "jax.nn.silu(1.702 * upcast(gate)) / 1.702"),
    ("layers:swiglu", "F.silu(upcast(gate))", "F.silu(1.702 * upcast(gate)) / 1.702"),
    place=SWIGLU,
)
jax("no up branch", "layers:swiglu", "upcast(up)", "1.0", place=SWIGLU)
torch(
    "rounded twice",
    "layers:swiglu",
    "(F.silu(upcast(gate)) * upcast(up)).to(gate.dtype)",
    "F.silu(gate) * up",
    "precision",
    "swiglu",
    dtype="bfloat16",
)
same_edit(
    "gate in bfloat16",
    "layers:swiglu",
    "upcast(gate)",
    "gate",
    "precision",
    "swiglu",
    dtype="bfloat16",
    side=BOTH,
)
torch(
    "no residual around the MLP",
    "model:DecoderLayer.forward",
    "x + self.mlp(self.post_attention_layernorm(x))",
    "self.mlp(self.post_attention_layernorm(x))",
    place=LAYER,
)
jax("no residual around attention", "model:DecoderLayer.__call__", "x = x + h", "x = h", place=LAYER)
torch(
    "MLP and attention in parallel",
    "model:DecoderLayer.forward",
    "x = x + self.self_attn(self.input_layernorm(x), place, cache, layer)\n"
    "return x + self.mlp(self.post_attention_layernorm(x))",
    "return x + self.self_attn(self.input_layernorm(x), place, cache, layer) + "
    "self.mlp(self.post_attention_layernorm(x))",
    place=LAYER,
)
jax(
    "last layer run twice",
    "model:Transformer.__call__",
    "self.norm(x)",
    "self.norm(apply_layer(0, slice_layers(self.get_variable('params', 'layers'))[-1], x, None)[0])",
    place="model",
)
torch(
    "last layer left out",
    "model:Transformer.forward",
    "enumerate(self.layers)",
    "enumerate(self.layers[:-1])",
    place="model",
)

# --- embedding and head
area("embedding and head")
jax(
    "embedding times sqrt(D)",
    "model:Transformer.__call__",
    "self.embed_tokens(input_ids)",
    "self.embed_tokens(input_ids) * self.cfg.hidden_size ** 0.5",
    place="model",
    quick=True,
)
torch("tied though it is not", "model:CausalLM.forward", "self.lm_head is None", "True", place="lm_head")
both(
    "logits capped softly",
    ("model:CausalLM.__call__", "return logits, cache", "return 30 * jnp.tanh(logits / 30), cache"),
    (
        "model:CausalLM.forward",
        "return self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)",
        "x = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)\nreturn 30 * "
        "torch.tanh(x / 30)",
    ),
    place="the model",
)
jax(
    "head before the final norm",
    "model:Transformer.__call__",
    "return self.norm(x), cache",
    "return x, cache",
    place="model",
)
torch(
    "token ids one too high",
    "model:Transformer.forward",
    "self.embed_tokens(input_ids)",
    "self.embed_tokens((input_ids + 1) % len(self.embed_tokens.weight))",
    place="model.embed_tokens",
)
jax(
    "gradient sums in bfloat16",
    "layers:embedding",
    "upcast(weight)[input_ids].astype(weight.dtype)",
    "weight[input_ids]",
    "precision",
    "embedding gradient",
    dtype="bfloat16",
)
torch(
    "gradient divided by frequency",
    "layers:embedding",
    "F.embedding(input_ids, upcast(weight))",
    "F.embedding(input_ids, upcast(weight), scale_grad_by_freq=True)",
    "gradients",
    "model.embed_tokens.weight",
)
torch(
    "row 0 taken for padding",
    "layers:embedding",
    "F.embedding(input_ids, upcast(weight))",
    "F.embedding(input_ids, upcast(weight), padding_idx=0)",
    "gradients",
    "model.embed_tokens.weight",
)
