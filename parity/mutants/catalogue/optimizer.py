"""Planted bugs of AdamW, clipping and schedule."""

from parity.mutants.catalogue.mutant import area, both, jax, shared, torch

# --- optimizer
area("optimizer")
STEP = {"check": "adamw"}
MU = "optimizer: mu"
NU = "optimizer: nu"
UP = "optimizer: update"
DECAY = "optimizer: update of model.embed_tokens.weight"
jax(
    "beta2 for beta1", "optim:adamw", "beta1 * m + (1.0 - beta1) * g", "beta2 * m + (1.0 - beta2) * g", place=MU, **STEP
)
torch(
    "beta2 0.999",
    "optim:adamw_update",
    "nu.mul_(beta2).add_((1.0 - beta2) * g * g)",
    "nu.mul_(0.999).add_(0.001 * g * g)",
    place=NU,
    quick=True,
    **STEP,
)
jax("nu of |g|", "optim:adamw", "(1.0 - beta2) * g * g", "(1.0 - beta2) * jnp.abs(g)", place=NU, **STEP)
both(
    "mu without 1 - beta1",
    ("optim:adamw", "(1.0 - beta1) * g", "g"),
    ("optim:adamw_update", "(1.0 - beta1) * g", "g"),
    place=MU,
    **STEP,
)
torch(
    "eps 1e-6",
    "optim:adamw_update",
    "torch.sqrt(nu / correction2) + eps",
    "torch.sqrt(nu / correction2) + 1e-6",
    place=UP,
    **STEP,
)
jax(
    "eps inside the root",
    "optim:adamw",
    "jnp.sqrt(v / correction2) + eps",
    "jnp.sqrt(v / correction2 + eps)",
    place=UP,
    **STEP,
)
torch(
    "eps beside the uncorrected root",
    "optim:adamw_update",
    "torch.sqrt(nu / correction2) + eps",
    "(torch.sqrt(nu) + eps) / correction2 ** 0.5",
    place=UP,
    **STEP,
)
both(
    "mu not corrected",
    ("optim:adamw", "m / correction1", "m"),
    ("optim:adamw_update", "mu / correction1", "mu"),
    place=UP,
    **STEP,
)
torch("decay 1e-2", "optim:adamw_update", "weight_decay * p", "min(weight_decay, 1e-2) * p", place=DECAY, **STEP)
jax("decay 1e-4", "optim:adamw", "weight_decay * p", "1e-4 * p", place=DECAY, **STEP)
jax("no decay", "optim:adamw", "direction + weight_decay * p if decay else direction", "direction", place=DECAY, **STEP)
jax(
    "gains decay: the stacked leaf has two axes",
    "optim:decay_mask",
    "decays(shapes[leaf.names[0]])",
    "decays(shapes[leaf.names[0]]) or leaf.stacked",
    place="optimizer: update of model.layers.0.input_layernorm.weight",
    **STEP,
)
torch(
    "embedding does not decay",
    "optim:make_optimizer",
    "groups[not decays(p.shape)]",
    "groups[not decays(p.shape) or p.shape[0] == 96]",
    place=DECAY,
    **STEP,
)
jax(
    "L2 instead of decoupled decay",
    "optim:adamw",
    "mu = jax.tree.map(lambda g, m: beta1 * m + (1.0 - beta1) * g, updates, state.mu)",
    "updates = jax.tree.map(lambda g, p: g + weight_decay * p, updates, params)\n"
    "mu = jax.tree.map(lambda g, m: beta1 * m + (1.0 - beta1) * g, updates, state.mu)",
    place=MU,
    **STEP,
)
torch(
    "decay of the new weight",
    "optim:adamw_update",
    "p.sub_(lr * (direction + weight_decay * p))",
    "p.sub_(lr * direction)\np.sub_(lr * weight_decay * p)",
    place=DECAY,
    **STEP,
)
jax(
    "decay not times lr",
    "optim:adamw",
    "-lr * (direction + weight_decay * p if decay else direction)",
    "-lr * direction - (1e-3 * weight_decay * p if decay else 0.0)",
    place=DECAY,
    **STEP,
)
torch(
    "no bias correction",
    "optim:AdamW.step",
    "(group['lr'], *bias_corrections(beta1, beta2, self.count))",
    "(group['lr'], 1.0, 1.0)",
    place=UP,
    **STEP,
)
torch(
    "bias corrections swapped",
    "optim:adamw_update",
    "lr, correction1, correction2 = scalars",
    "lr, correction2, correction1 = scalars",
    place=UP,
    **STEP,
)
jax(
    "step up the gradient",
    "optim:adamw",
    "-lr * (direction + weight_decay * p if decay else direction)",
    "lr * (direction + weight_decay * p if decay else direction)",
    place=UP,
    **STEP,
)
torch("no update at all", "optim:AdamW.step", "...", "self.count += 1", place=MU, **STEP)
torch(
    "moments in bfloat16",
    "optim:AdamW._state",
    "torch.zeros_like(p, dtype=wide)",
    "torch.zeros_like(p, dtype=torch.bfloat16)",
    "precision",
    "moments",
    dtype="bfloat16",
)
torch("Adam's count advances by two", "optim:AdamW.step", "self.count += 1", "self.count += 2", place=UP, **STEP)
jax(
    "bias corrections of the steps, not the updates",
    "engine.train:with_deferred_count",
    "jnp.where(updated, yes, no)",
    "yes",
    place="",
    **STEP,
)
shared(
    "bias correction one late",
    "schedule:bias_corrections",
    "(1.0 - beta1**n, 1.0 - beta2**n)",
    "(1.0 - beta1**(n + 1), 1.0 - beta2**(n + 1))",
    "schedule",
    "bias_corrections",
)
shared(
    "corrections of the wrong beta",
    "schedule:bias_corrections",
    "(1.0 - beta1**n, 1.0 - beta2**n)",
    "(1.0 - beta2**n, 1.0 - beta2**n)",
    "schedule",
    "bias_corrections",
)
shared(
    "everything decays",
    "tensors:decays",
    "len(shape) >= 2",
    "True",
    "adamw",
    "optimizer: update of model.layers.0.input_layernorm.weight",
    quick=True,
)
shared("nothing decays", "tensors:decays", "len(shape) >= 2", "len(shape) >= 3", "adamw", DECAY)

area("clip")
CLIPPED, CLIP = "optimizer: mu", "optimizer: clip"
jax(
    "1e-6 beside the norm",
    "optim:clip_factor",
    "max_norm / norm",
    "max_norm / (norm + 1e-6)",
    place=CLIP,
    **STEP,
)
torch(
    "clip_grad_norm_",
    "optim:clip_factor",
    "torch.clamp(max_norm / norm, max=1.0)",
    "torch.clamp(max_norm / (norm + 1e-6), max=1.0)",
    place=CLIP,
    **STEP,
)
jax(
    "each tensor alone",
    "optim:clip",
    "jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)",
    "jax.tree.map(lambda g: g * clip_factor(global_norm(g), max_norm), updates)",
    place=CLIPPED,
    **STEP,
)
torch("never", "optim:clip_factor", "max_norm is None", "True", place=CLIP, **STEP)
both(
    "scales up too",
    ("optim:clip_factor", "jnp.minimum(1.0, max_norm / norm)", "max_norm / norm"),
    ("optim:clip_factor", "torch.clamp(max_norm / norm, max=1.0)", "max_norm / norm"),
    place="",
    **STEP,
)
torch(
    "returns the norm after clipping",
    "engine.train:Trainer.train_step",
    "read_later(loss, norm, ~finite, lr)",
    "read_later(loss, norm * factor, ~finite, lr)",
    place="optimizer: gradient norm",
    **STEP,
)
both(
    "norm without the root",
    ("optim:global_norm", "...", "return sum(jnp.sum(jnp.square(upcast(g))) for g in jax.tree.leaves(grads))"),
    ("optim:global_norm", "torch.sqrt(sums_of_squares(grads).sum())", "sums_of_squares(grads).sum()"),
    place="optimizer: gradient norm",
    **STEP,
)
jax(
    "the factor counts for matrices alone",
    "optim:clip",
    "jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)",
    "jax.tree.map(lambda g: g * factor if g.ndim > 1 else g, updates)",
    place="optimizer: mu of model.norm.weight",
    **STEP,
)

area("schedule")
shared(
    "warmup one early",
    "schedule:learning_rate",
    "cfg.lr_max * step / cfg.warmup_steps",
    "cfg.lr_max * (step + 1) / cfg.warmup_steps",
    "schedule",
    "learning_rate",
)
shared(
    "cosine one step early",
    "schedule:learning_rate",
    "cfg.total_steps - cfg.warmup_steps",
    "max(1, cfg.total_steps - cfg.warmup_steps - 1)",
    "schedule",
    "learning_rate",
    quick=True,
)
shared(
    "cosine to zero", "schedule:learning_rate", "(cfg.lr_max - cfg.lr_min)", "cfg.lr_max", "schedule", "learning_rate"
)
shared("cosine climbs again", "schedule:learning_rate", "step >= cfg.total_steps", "False", "schedule", "learning_rate")
shared(
    "the warmup counts within the cosine",
    "schedule:learning_rate",
    "(step - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps)",
    "step / cfg.total_steps",
    "schedule",
    "learning_rate",
)
shared(
    "linear for cosine",
    "schedule:learning_rate",
    "0.5 * (1.0 + math.cos(math.pi * progress))",
    "(1.0 - progress)",
    "schedule",
    "learning_rate",
)
shared(
    "lr of the updates, not of the steps",
    "schedule:step_scalars",
    "learning_rate(cfg, step)",
    "learning_rate(cfg, adam_count)",
    "schedule",
    "step_scalars",
)
shared(
    "corrections count from 0",
    "schedule:step_scalars",
    "adam_count + 1",
    "max(adam_count, 1)",
    "schedule",
    "step_scalars",
)
torch(
    "lr of the step after",
    "engine.train:Trainer.train_step",
    "learning_rate(self.recipe.optimizer, self.step)",
    "learning_rate(self.recipe.optimizer, self.step + 1)",
    place=UP,
    **STEP,
)
jax("a skipped step does not count", "engine.train:make_train_step", "state.step + 1", "state.step + finite", **STEP)
torch(
    "a skipped step is not skipped",
    "engine.train:Trainer.train_step",
    "torch.isfinite(norm)",
    "torch.ones((), dtype=torch.bool)",
    **STEP,
)
both(
    "a skipped step counts as an update",
    ("engine.train:make_train_step", "state.adam_count + finite", "state.adam_count + 1"),
    ("engine.train:Trainer.train_step", "self.step += 1", "self.step += 1\nself.optimizer.count += not bool(finite)"),
    **STEP,
)
