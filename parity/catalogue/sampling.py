"""Planted bugs of random bits, sampler, cache and generation."""

from parity.catalogue.mutant import ATTENTION, alike, area, both, jax, shared, torch

CORE = f"{ATTENTION}.attention"
# --- start of training and random bits
area("random bits and initial weights")
EMBED = "model.embed_tokens.weight"
shared(
    "no residual scale",
    "tensors:init_range",
    "INIT_STD / math.sqrt(2 * cfg.num_hidden_layers) if residual else INIT_STD",
    "INIT_STD",
    "init",
    f"{ATTENTION}.o_proj.weight",
)
shared(
    "residual scale of one branch a layer",
    "tensors:init_range",
    "2 * cfg.num_hidden_layers",
    "cfg.num_hidden_layers",
    "init",
    f"{ATTENTION}.o_proj.weight",
)
shared("standard deviation for width", "tensors:init_range", "std * math.sqrt(12.0)", "std", "init", EMBED)
shared(
    "gains start at 0",
    "tensors:init_constant",
    "0.0 if name.endswith('.bias') else 1.0",
    "0.0",
    "init",
    "model.layers.0.input_layernorm.weight",
)
jax("keys count from 1", "model:init_params", "enumerate(shapes)", "enumerate(shapes, 1)", "init", EMBED)
torch(
    "keys by sorted names",
    "model:CausalLM.init_weights",
    "enumerate(tensor_shapes(self.cfg))",
    "enumerate(sorted(tensor_shapes(self.cfg)))",
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
alike("u not centred", "random_bits:uniform", "0.5", "0.0", "init", EMBED)
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
alike("min-p against 1", "sampling:filter_logits", "cfg.min_p * probs[..., :1]", "cfg.min_p", place=ALL, **TOKENS)
alike(
    "temperature ignored",
    "sampling:filter_logits",
    "upcast(logits) / cfg.temperature",
    "upcast(logits)",
    place=TOP_K,
    **TOKENS,
)
alike(
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
alike("the noise is subtracted", "sampling:sample", "filtered + noise", "filtered - noise", dtype="bfloat16", **TOKENS)

# --- cache and generation
area("KV cache")
CACHE = {"check": "cache"}
torch(
    "written one slot late",
    "kv_cache:KVCache.update",
    "self.k[layer][rows, positions] = k",
    "self.k[layer][rows, positions - (1 if self.filled and k.shape[1] == 1 else 0)] = k",
    place="kv_cache",
    quick=True,
    **CACHE,
)
jax(
    "values written where the keys are",
    "kv_cache:update",
    "cache.v.at[rows, positions].set(v)",
    "cache.v.at[rows, positions].set(k)",
    place="kv_cache",
    **CACHE,
)
torch(
    "the second layer keeps no values",
    "kv_cache:KVCache.update",
    "self.v[layer][rows, positions] = v",
    "self.v[layer][rows, positions] = v if layer == 0 else 0.0",
    place="kv_cache",
    **CACHE,
)
jax(
    "offset of the positions ignored",
    "model:Transformer.__call__",
    "cache.length[:, None] + jnp.arange(t)",
    "0 * cache.length[:, None] + jnp.arange(t)",
    place="rotary table",
    **CACHE,
)
torch(
    "rotation without the offset",
    "rope:RotaryTable.__call__",
    "(cos[positions], sin[positions])",
    "(cos[: positions.shape[-1]], sin[: positions.shape[-1]])",
    place="rotary table",
    **CACHE,
)
both(
    "the mask aligns top left",
    (
        "model:Transformer.__call__",
        "causal_mask(positions, jnp.arange(slots), self.cfg.sliding_window)[:, None]",
        "causal_mask(positions - cache.length[:, None], jnp.arange(slots), self.cfg.sliding_window)[:, None]",
    ),
    (
        "model:Transformer.forward",
        "causal_mask(positions, slots, self.cfg.sliding_window)[:, None]",
        "causal_mask(positions - cache.length[:, None], slots, self.cfg.sliding_window)[:, None]",
    ),
    place=CORE,
    **CACHE,
)
jax(
    "empty slots seen",
    "model:Transformer.__call__",
    "causal_mask(positions, jnp.arange(slots), self.cfg.sliding_window)[:, None]",
    "causal_mask(positions + 1, jnp.arange(slots), self.cfg.sliding_window)[:, None]",
    place=CORE,
    **CACHE,
)
both(
    "keys kept before the rotation",
    (
        "attention:Attention.__call__",
        "k, v = cache = update(cache, k, v, positions)",
        "k, v = cache = update(cache, apply_rope(k, cos, -sin), v, positions)",
    ),
    (
        "attention:Attention.forward",
        "k, v = cache.update(layer, k, v)",
        "k, v = cache.update(layer, apply_rope(k, cos, -sin), v)",
    ),
    place=ATTENTION,
    **CACHE,
)
torch(
    "lengths not advanced",
    "kv_cache:KVCache.advance",
    "self.length.add_(t)",
    "pass",
    place="rotary table",
    **CACHE,
)
jax(
    "lengths advance by one",
    "model:Transformer.__call__",
    "cache.length + t",
    "cache.length + 1",
    place="rotary table",
    **CACHE,
)
both(
    "window ignored with a cache",
    (
        "model:Transformer.__call__",
        "causal_mask(positions, jnp.arange(slots), self.cfg.sliding_window)",
        "causal_mask(positions, jnp.arange(slots), None)",
    ),
    (
        "model:Transformer.forward",
        "causal_mask(positions, slots, self.cfg.sliding_window)",
        "causal_mask(positions, slots, None)",
    ),
    place=CORE,
    **CACHE,
)
FUSED = {"check": "cache", "place": "fuse_projections"}
jax(
    "fused keys before queries",
    "generate:fuse_projections",
    "[layer[block][name] for name in names]",
    "[layer[block][name] for name in sorted(names)]",
    **FUSED,
)
torch(
    "fused keys before queries",
    "generate:fuse_projections",
    "[module.get_submodule(name) for name in names]",
    "[module.get_submodule(name) for name in sorted(names)]",
    **FUSED,
)
both(
    "fused up for gate",
    ("layers:MLP.__call__", "gate, up = jnp.split(both, 2, axis=-1)", "up, gate = jnp.split(both, 2, axis=-1)"),
    (
        "layers:MLP.forward",
        "gate, up = self.gate_up_proj(x).chunk(2, dim=-1)",
        "up, gate = self.gate_up_proj(x).chunk(2, dim=-1)",
    ),
    **FUSED,
)
torch(
    "fused values for keys",
    "attention:Attention.forward",
    "q, k, v = self.qkv_proj(x).reshape(b, t, -1, self.h).split([self.n, self.kv_heads, self.kv_heads], dim=2)",
    "q, v, k = self.qkv_proj(x).reshape(b, t, -1, self.h).split([self.n, self.kv_heads, self.kv_heads], dim=2)",
    **FUSED,
)
torch(
    "fused bias lost",
    "generate:fuse_projections",
    "Linear(1, 1, parts[0].bias is not None)",
    "Linear(1, 1, False)",
    **FUSED,
)
area("generation")
GENERATE = {"check": "tokens", "place": "generate"}
torch("padding kept", "kv_cache:KVCache.set_length", "self.length.copy_(length)", "pass", **GENERATE)
jax("padding kept", "generate:decode_step", "cache.length + last + 1", "cache.length + t", **GENERATE)
jax(
    "cache adds where it should overwrite",
    "kv_cache:update",
    "cache.k.at[rows, positions].set(k)",
    "cache.k.at[rows, positions].add(k)",
    **GENERATE,
)
torch("logits of the padding", "generate:decode_step", "lengths is None", "True", **GENERATE)
jax("end of text ignored", "generate:generate_stream", "token in eos_ids", "False", **GENERATE)
both(
    "end of text kept",
    (
        "generate:generate_stream",
        "done[row] = done[row] or token in eos_ids\nif not done[row]:\n"
        "    new[row].append(token)\n    texts[row].append(token)\n    done[row] = finished is not None and finished(row, texts[row])",
        "if not done[row]:\n    new[row].append(token)\n    texts[row].append(token)\n    done[row] = token in eos_ids",
    ),
    (
        "generate:generate_stream",
        "done[row] = done[row] or token in eos_ids\nif not done[row]:\n"
        "    new[row].append(token)\n    texts[row].append(token)\n    done[row] = finished is not None and finished(row, texts[row])",
        "if not done[row]:\n    new[row].append(token)\n    texts[row].append(token)\n    done[row] = token in eos_ids",
    ),
    **GENERATE,
)
both(
    "drawn for the position before",
    (
        "generate:decode_step",
        "sample(logits[:, 0], sampling, key, numbers, new_cache.length)",
        "sample(logits[:, 0], sampling, key, numbers, new_cache.length - 1)",
    ),
    (
        "generate:decode_step",
        "sample(logits[:, 0], sampling, key, numbers, cache.length)",
        "sample(logits[:, 0], sampling, key, numbers, cache.length - 1)",
    ),
    **GENERATE,
)
torch(
    "drawn for the padded position",
    "generate:decode_step",
    "sample(logits[:, 0], sampling, key, numbers, cache.length)",
    "sample(logits[:, 0], sampling, key, numbers, cache.length.max().expand(cache.length.shape))",
    **GENERATE,
)
jax(
    "texts numbered from 1",
    "generate:generate_stream",
    "np.arange(b, dtype=np.int32) if numbers is None else np.array(numbers, np.int32)",
    "1 + np.arange(b, dtype=np.int32)",
    **GENERATE,
)
