"""Planted bugs of loss and gradients."""

from parity.mutants.catalogue.mutant import LAST, area, both, jax, same_edit, torch

REF = "attention:reference_attention"
NORM = "layers:rms_norm"
# --- loss and gradients
area("loss")
LOSS = {"check": "loss", "runs": "gradients"}
jax("sum for mean", "loss:cross_entropy", "total / jnp.maximum(count, 1)", "total", place="loss", **LOSS)
torch(
    "-100 counted",
    "engine.gradients:loss_and_grads",
    "(targets != IGNORE_INDEX).sum()",
    "torch.tensor(targets.numel())",
    place="loss",
    **LOSS,
)
same_edit(
    "one target too many counted",
    "loss:cross_entropy",
    "count = own_count if count is None else count",
    "count = (own_count if count is None else count) + 1",
    place="loss",
    **LOSS,
)
both(
    "label smoothing",
    (
        "loss:cross_entropy_sum",
        "jax.nn.logsumexp(logits, axis=-1) - picked",
        "jax.nn.logsumexp(logits, axis=-1) - 0.9 * picked - 0.1 * logits.mean(axis=-1)",
    ),
    (
        "loss:cross_entropy_sum",
        'F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="sum")',
        'F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=0.1)',
    ),
    place="loss",
    quick=True,
    **LOSS,
)
jax(
    "z-loss left on",
    "loss:cross_entropy_sum",
    "jax.nn.logsumexp(logits, axis=-1) - picked",
    "jax.nn.logsumexp(logits, axis=-1) - picked + 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2",
    place="loss",
    **LOSS,
)
torch(
    "shifted twice",
    "model:mean_loss",
    "cross_entropy(model(inputs), targets, count)",
    "cross_entropy(model(inputs)[:, :-1], targets[:, 1:], count)",
    place="the model",
    **LOSS,
)
jax(
    "targets not shifted: the inputs",
    "model:mean_loss",
    "cross_entropy(logits, targets, count)",
    "cross_entropy(logits, inputs, count)",
    place="loss",
    **LOSS,
)
both(
    "-100 read as token 0",
    (
        "loss:cross_entropy_sum",
        "counted = targets != IGNORE_INDEX",
        "targets = jnp.where(targets == IGNORE_INDEX, 0, targets)\ncounted = targets != IGNORE_INDEX",
    ),
    (
        "loss:cross_entropy_sum",
        "total = F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction='sum')",
        "targets = targets.clamp(min=0)\ntotal = F.cross_entropy(logits, targets.long(), reduction='sum')",
    ),
    place="loss",
    **LOSS,
)
same_edit(
    "loss in bfloat16",
    "loss:cross_entropy_sum",
    "upcast(logits)",
    "logits",
    "precision",
    "cross_entropy",
    dtype="bfloat16",
)
jax(
    "mean of the micro-batches' means",
    "loss:cross_entropy",
    "count = own_count if count is None else count",
    "count = own_count * (3 if len(targets) == 1 else 1)",
    **LOSS,
)
torch(
    "last micro-batch alone",
    "engine.gradients:loss_and_grads",
    "loss.backward()",
    "model.zero_grad()\nloss.backward()",
    "gradients",
)
same_edit(
    "mean over each micro-batch's own tokens",
    "loss:cross_entropy",
    "count = own_count if count is None else count",
    "count = own_count",
    **LOSS,
)
jax(
    "gradients averaged over micro-batches",
    "engine.gradients:loss_and_grads",
    "(loss, grads), _ = jax.lax.scan(add, (zero_loss, zero), (cut(inputs), cut(targets)))",
    "(loss, grads), _ = jax.lax.scan(add, (zero_loss, zero), (cut(inputs), cut(targets)))\n"
    "grads = jax.tree.map(lambda g: g / accumulation_steps, grads)",
    "gradients",
)
jax(
    "logits in parts: the loss of the last alone",
    "fast.chunked_loss:_chunks_forward",
    "total + cross_entropy(logits, targets, count)",
    "cross_entropy(logits, targets, count)",
    **LOSS,
)
torch(
    "logits in parts: each part's own mean",
    "fast.chunked_loss:_Chunks.forward",
    "cross_entropy(logits, own_targets, count)",
    "cross_entropy(logits, own_targets)",
    **LOSS,
)
torch(
    "logits in parts: gradient of targets that do not count",
    "fast.chunked_loss:d_cross_entropy",
    "targets != IGNORE_INDEX",
    "targets == targets",
    "gradients",
)
both(
    "logits in parts: the head learns from the last alone",
    (
        "fast.chunked_loss:_chunks_forward",
        'd_weight + upcast(jnp.einsum("btv,btd->vd", d_logits, x))',
        'upcast(jnp.einsum("btv,btd->vd", d_logits, x))',
    ),
    (
        "fast.chunked_loss:_Chunks.forward",
        "d_weight + upcast(d_logits.flatten(0, 1).T @ own.flatten(0, 1))",
        "upcast(d_logits.flatten(0, 1).T @ own.flatten(0, 1))",
    ),
    "gradients",
)
area("gradient")
GRAD = {"check": "gradients"}
jax(
    "MLP detached",
    "model:DecoderLayer.__call__",
    'x + MLP(self.cfg.intermediate_size, kernels, name="mlp")(h)',
    'x + jax.lax.stop_gradient(MLP(self.cfg.intermediate_size, kernels, name="mlp")(h))',
    place=LAST,
    **GRAD,
)
torch(
    "attention detached",
    "model:DecoderLayer.forward",
    "self.self_attn(self.input_layernorm(x), place, cache, layer)",
    "self.self_attn(self.input_layernorm(x), place, cache, layer).detach()",
    place=LAST,
    quick=True,
    **GRAD,
)
torch(
    "gate detached",
    "layers:swiglu",
    "F.silu(upcast(gate))",
    "F.silu(upcast(gate).detach())",
    place=f"{LAST}.mlp.swiglu",
    **GRAD,
)
jax(
    "scale of the norm detached",
    NORM,
    "jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)",
    "jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps))",
    place="model.norm",
    **GRAD,
)
both(
    "probabilities detached",
    (
        REF,
        "jnp.einsum('bkgts,bskh->btkgh', probs, v)",
        "jnp.einsum('bkgts,bskh->btkgh', jax.lax.stop_gradient(probs), v)",
    ),
    (REF, "torch.einsum('bkgts,bskh->btkgh', probs, v)", "torch.einsum('bkgts,bskh->btkgh', probs.detach(), v)"),
    place=f"{LAST}.self_attn.attention",
    **GRAD,
)
torch(
    "gain frozen",
    "layers:RMSNorm.forward",
    "self.function(x, self.weight, self.eps)",
    "self.function(x, self.weight.detach(), self.eps)",
    place="model.norm.weight",
    **GRAD,
)
jax(
    "gradient stops before the head",
    "model:CausalLM.__call__",
    "self.lm_head(x)",
    "self.lm_head(jax.lax.stop_gradient(x))",
    place="the model",
    **GRAD,
)
both(
    "embedding detached",
    (
        "model:Transformer.__call__",
        "self.embed_tokens(input_ids)",
        "jax.lax.stop_gradient(self.embed_tokens(input_ids))",
    ),
    ("model:Transformer.forward", "self.embed_tokens(input_ids)", "self.embed_tokens(input_ids).detach()"),
    place="model",
    **GRAD,
)
