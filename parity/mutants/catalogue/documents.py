"""Planted bugs of documents that do not see each other."""

from parity.mutants.catalogue.mutant import area, both, jax, torch

area("documents")
APART = {"check": "loss", "runs": "gradients"}
SEEN = "(same & causal_mask(t, t, window))[:, None]"
jax(
    "documents see what is before them",
    "documents:inside_documents",
    SEEN,
    "causal_mask(t, t, window)[None, None]",
    place="inside_documents",
    **APART,
)
torch(
    "the end of a document sees only itself",
    "documents:inside_documents",
    "torch.cumsum(ends, dim=1) - ends",
    "torch.cumsum(ends, dim=1)",
    quick=True,
    place="inside_documents",
    **APART,
)
jax(
    "the end of a document belongs to the next",
    "documents:inside_documents",
    "jnp.cumsum(ends, axis=1) - ends",
    "jnp.cumsum(ends, axis=1)",
    place="inside_documents",
    **APART,
)
torch(
    "documents see what is after them",
    "documents:inside_documents",
    SEEN,
    "same[:, None]",
    place="inside_documents",
    **APART,
)
torch(
    "the mask forgotten where layers are computed again",
    "fast.layers:Remat.__call__",
    "checkpoint(layer, x, place, use_reentrant=False, **REMAT_OPTIONS[self.policy])",
    "checkpoint(layer, x, place._replace(mask=None), use_reentrant=False, **REMAT_OPTIONS[self.policy])",
    **APART,
)
both(
    "only the next document is apart",
    (
        "documents:inside_documents",
        "jnp.cumsum(ends, axis=1) - ends",
        "jnp.minimum(jnp.cumsum(ends, axis=1) - ends, 1)",
    ),
    (
        "documents:inside_documents",
        "torch.cumsum(ends, dim=1) - ends",
        "(torch.cumsum(ends, dim=1) - ends).clamp(max=1)",
    ),
    place="inside_documents",
    **APART,
)
jax(
    "of several separators the first alone counts",
    "documents:inside_documents",
    "[input_ids == x for x in separators]",
    "[input_ids == x for x in separators[:1]]",
    place="inside_documents",
    **APART,
)
torch(
    "of several separators the last alone counts",
    "documents:inside_documents",
    "[input_ids == x for x in separators]",
    "[input_ids == x for x in separators[-1:]]",
    place="inside_documents",
    **APART,
)
