"""Planted bugs of random bits and sampler."""

from parity.mutants.catalogue.mutant import ATTENTION, area, both, jax, same_edit, shared, torch

# --- start of training and random bits
area("random bits and initial weights")
EMBED = "initial weights: model.embed_tokens.weight"
shared(
    "no residual scale",
    "tensors:init_range",
    "INIT_STD / math.sqrt(2 * cfg.num_hidden_layers) if residual else INIT_STD",
    "INIT_STD",
    "init",
    f"initial weights: {ATTENTION}.o_proj.weight",
)
shared(
    "residual scale of one branch a layer",
    "tensors:init_range",
    "2 * cfg.num_hidden_layers",
    "cfg.num_hidden_layers",
    "init",
    f"initial weights: {ATTENTION}.o_proj.weight",
)
shared("standard deviation for width", "tensors:init_range", "std * math.sqrt(12.0)", "std", "init", EMBED)
shared(
    "gains start at 0",
    "tensors:init_constant",
    "0.0 if name.endswith('.bias') else 1.0",
    "0.0",
    "init",
    "initial weights: model.layers.0.input_layernorm.weight",
)
jax("keys count from 1", "model:init_params", "enumerate(shapes)", "enumerate(shapes, 1)", "init", EMBED)
torch(
    "keys by sorted names",
    "model:initial_tensors",
    "enumerate(tensor_shapes(cfg).items())",
    "enumerate(sorted(tensor_shapes(cfg).items()))",
    "init",
    EMBED,
)
torch(
    "noise without the half cell",
    "random_bits:uniform",
    "(bits >> 9).to(dtype) + 0.5",
    "(bits >> 9).to(dtype) + 1e-6",
    "init",
    EMBED,
    quick=True,
)
torch(
    "one more bit of the word",
    "random_bits:uniform",
    "((bits >> 9).to(dtype) + 0.5) * 2.0**-23",
    "((bits >> 8).to(dtype) + 0.5) * 2.0**-24",
    "init",
    EMBED,
)
jax("lower bits of the word", "random_bits:uniform", "bits >> 9", "bits & 0x7FFFFF", "init", EMBED)
torch("key words swapped", "random_bits:key", "[0, seed]", "[seed, 0]", "init", EMBED)
same_edit("u not centred", "random_bits:uniform", "0.5", "0.0", "init", EMBED)
shared("rotation constant", "random_bits:ROTATIONS", "", "((13, 15, 26, 6), (17, 29, 16, 25))", "data", "Order")
shared("one round too few", "random_bits:threefry2x32", "range(5)", "range(4)", "data", "Order")
shared(
    "the seed's key is not folded",
    "random_bits:fold_in",
    "np.stack(threefry2x32(key, np.zeros_like(data), data), axis=-1)",
    "np.stack(threefry2x32(key, data, np.zeros_like(data)), axis=-1)",
    "data",
    "Order",
)

# --- sampler
area("sampler")
TOKENS = {"check": "tokens"}
TOP_P, TOP_K, ALL = (
    "filter_logits (temperature 1.3, top-p 0.6)",
    "filter_logits (temperature 1.5, top-k 3)",
    "filter_logits (top-k 12, top-p 0.9, min-p 0.2)",
)
jax(
    "temperature after the filters",
    "sampling:filter_logits",
    "return jnp.where(keep, logits, -jnp.inf)",
    "return jnp.where(keep, logits, -jnp.inf) / cfg.temperature",
    place=TOP_K,
    **TOKENS,
)
torch(
    "top-p drops the token that crosses",
    "sampling:filter_logits",
    "torch.cumsum(probs, dim=-1) - probs < cfg.top_p",
    "(torch.cumsum(probs, dim=-1) <= cfg.top_p) | (torch.arange(len(probs[0])) == 0)",
    place=TOP_P,
    quick=True,
    **TOKENS,
)
both(
    "top-p keeps one more",
    (
        "sampling:filter_logits",
        "jnp.cumsum(probs, axis=-1) - probs < cfg.top_p",
        "jnp.roll(jnp.cumsum(probs, axis=-1) - probs < cfg.top_p, 1, -1).at[..., 0].set(True)",
    ),
    (
        "sampling:filter_logits",
        "torch.cumsum(probs, dim=-1) - probs < cfg.top_p",
        "torch.roll(torch.cumsum(probs, dim=-1) - probs < cfg.top_p, 1, -1) | (torch.arange(len(probs[0])) == 0)",
    ),
    place=TOP_P,
    **TOKENS,
)
torch(
    "top-k keeps one more",
    "sampling:filter_logits",
    "torch.arange(ranked.shape[-1], device=ranked.device) < cfg.top_k",
    "torch.arange(ranked.shape[-1], device=ranked.device) <= cfg.top_k",
    place=TOP_K,
    **TOKENS,
)
jax(
    "top-k keeps all that tie",
    "sampling:filter_logits",
    "jnp.arange(ranked.shape[-1]) < cfg.top_k",
    "ranked >= ranked[..., cfg.top_k - 1 : cfg.top_k]",
    place=TOP_K,
    **TOKENS,
)
torch(
    "ties to the highest id",
    "sampling:filter_logits",
    "ranked, order = torch.sort(logits, dim=-1, stable=True, descending=True)",
    "ranked, order = torch.sort(logits, dim=-1, stable=True)\nranked, order = ranked.flip(-1), order.flip(-1)",
    place=TOP_K,
    **TOKENS,
)
both(
    "top-p over all tokens",
    (
        "sampling:filter_logits",
        "jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)",
        "jax.nn.softmax(ranked, axis=-1)",
    ),
    (
        "sampling:filter_logits",
        "torch.softmax(torch.where(keep, ranked, -torch.inf), dim=-1)",
        "torch.softmax(ranked, dim=-1)",
    ),
    place=ALL,
    **TOKENS,
)
same_edit("min-p against 1", "sampling:filter_logits", "cfg.min_p * probs[..., :1]", "cfg.min_p", place=ALL, **TOKENS)
same_edit(
    "temperature ignored",
    "sampling:filter_logits",
    "upcast(logits) / cfg.temperature",
    "upcast(logits)",
    place=TOP_K,
    **TOKENS,
)
same_edit(
    "temperature squared",
    "sampling:filter_logits",
    "upcast(logits) / cfg.temperature",
    "upcast(logits) / cfg.temperature**2",
    place=TOP_K,
    **TOKENS,
)
jax(
    "sampler in bfloat16",
    "sampling:filter_logits",
    "upcast(logits) / cfg.temperature",
    "logits / cfg.temperature",
    dtype="bfloat16",
    **TOKENS,
)
jax(
    "one key for all positions",
    "sampling:gumbel_noise",
    "random_bits.fold_in(random_bits.fold_in(key, row), position)",
    "random_bits.fold_in(key, row)",
    place="gumbel_noise",
    **TOKENS,
)
torch(
    "one key for all rows",
    "sampling:gumbel_noise",
    "random_bits.fold_in(random_bits.fold_in(key, rows), positions)",
    "random_bits.fold_in(key, positions)",
    place="gumbel_noise",
    **TOKENS,
)
both(
    "row and position swapped",
    (
        "sampling:gumbel_noise",
        "random_bits.fold_in(random_bits.fold_in(key, row), position)",
        "random_bits.fold_in(random_bits.fold_in(key, position), row)",
    ),
    (
        "sampling:gumbel_noise",
        "random_bits.fold_in(random_bits.fold_in(key, rows), positions)",
        "random_bits.fold_in(random_bits.fold_in(key, positions), rows)",
    ),
    place="gumbel_noise",
    **TOKENS,
)
jax(
    "exponential noise",
    "sampling:gumbel_noise",
    "-jnp.log(-jnp.log(jax.vmap(one)(rows, positions)))",
    "-jnp.log(jax.vmap(one)(rows, positions))",
    place="gumbel_noise",
    **TOKENS,
)
torch(
    "greedy takes the last of equals",
    "sampling:sample",
    "torch.argmax(upcast(logits), dim=-1)",
    "logits.shape[-1] - 1 - torch.argmax(upcast(logits).flip(-1), dim=-1)",
    place="sample (greedy)",
    **TOKENS,
)
same_edit(
    "the noise is subtracted", "sampling:sample", "filtered + noise", "filtered - noise", dtype="bfloat16", **TOKENS
)
