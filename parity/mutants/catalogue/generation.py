"""Planted bugs of cache, fused projections and generation."""

from parity.mutants.catalogue.mutant import ATTENTION, area, both, jax, shared, torch

CORE = f"{ATTENTION}.attention"
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
    "cache.v.at[at].set(v, unique_indices=True)",
    "cache.v.at[at].set(k, unique_indices=True)",
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
    "model:causal_places",
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
        "model:causal_places",
        "causal_mask(positions, jnp.arange(slots), cfg.sliding_window)[:, None]",
        "causal_mask(positions - cache.length[:, None], jnp.arange(slots), cfg.sliding_window)[:, None]",
    ),
    (
        "model:CausalPlaces.__call__",
        "causal_mask(positions, slots, window)[:, None]",
        "causal_mask(positions - cache.length[:, None], slots, window)[:, None]",
    ),
    place=CORE,
    **CACHE,
)
jax(
    "empty slots seen",
    "model:causal_places",
    "causal_mask(positions, jnp.arange(slots), cfg.sliding_window)[:, None]",
    "causal_mask(positions + 1, jnp.arange(slots), cfg.sliding_window)[:, None]",
    place=CORE,
    **CACHE,
)
both(
    "keys kept before the rotation",
    (
        "attention:Attention.__call__",
        "k, v = cache = update(cache, k, v, place.slots)",
        "k, v = cache = update(cache, apply_rope(k, place.cos, -place.sin), v, place.slots)",
    ),
    (
        "attention:Attention.forward",
        "k, v = cache.update(layer, k, v)",
        "k, v = cache.update(layer, apply_rope(k, place.cos, -place.sin), v)",
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
    "model:run_layers",
    "cache.length + x.shape[1]",
    "cache.length + 1",
    place="rotary table",
    **CACHE,
)
both(
    "window ignored with a cache",
    (
        "model:causal_places",
        "causal_mask(positions, jnp.arange(slots), cfg.sliding_window)",
        "causal_mask(positions, jnp.arange(slots), None)",
    ),
    (
        "model:CausalPlaces.__call__",
        "causal_mask(positions, slots, window)",
        "causal_mask(positions, slots, None)",
    ),
    place=CORE,
    **CACHE,
)
FUSED = {"check": "cache", "place": "fuse_projections"}
jax(
    "fused keys before queries",
    "engine.decoding:fuse_projections",
    "[layer[block][name] for name in names]",
    "[layer[block][name] for name in sorted(names)]",
    **FUSED,
)
torch(
    "fused keys before queries",
    "engine.decoding:fuse_projections",
    "[module.get_submodule(name) for name in names]",
    "[module.get_submodule(name) for name in sorted(names)]",
    **FUSED,
)
both(
    "fused up for gate",
    ("fast.products:fused_gate_up", "return gate, up", "return up, gate"),
    (
        "fast.products:fused_gate_up",
        "mlp.gate_up_proj(x).chunk(2, dim=-1)",
        "mlp.gate_up_proj(x).chunk(2, dim=-1)[::-1]",
    ),
    **FUSED,
)
torch(
    "fused values for keys",
    "fast.products:fused_qkv",
    "return qkv.split([cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads], dim=2)",
    "q, v, k = qkv.split([cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads], dim=2)\nreturn "
    "q, k, v",
    **FUSED,
)
torch(
    "fused bias lost",
    "engine.decoding:fuse_projections",
    "Linear(1, 1, bias=parts[0].bias is not None)",
    "Linear(1, 1, bias=False)",
    **FUSED,
)
area("generation")
GENERATE = {"check": "tokens", "place": "generate"}
torch("padding kept", "kv_cache:KVCache.set_length", "self.length.copy_(length)", "pass", **GENERATE)
jax("padding kept", "engine.decoding:decode_step", "cache.length + last + 1", "cache.length + t", **GENERATE)
jax(
    "cache adds where it should overwrite",
    "kv_cache:update",
    "cache.k.at[at].set(k, unique_indices=True)",
    "cache.k.at[at].add(k, unique_indices=True)",
    **GENERATE,
)
torch("logits of the padding", "engine.decoding:decode_step", "lengths is None", "True", **GENERATE)
shared(
    "end of text ignored",
    "text.drawn_texts:DrawnTexts.add",
    "token in self._eos_ids",
    "False",
    **GENERATE,
)
shared(
    "end of text kept",
    "text.drawn_texts:DrawnTexts.add",
    "self._ended[row] = self._ended[row] or token in self._eos_ids\n"
    "if not self._ended[row]:\n"
    "    new[row].append(token)\n"
    "    self.texts[row].append(token)\n"
    "    self._ended[row] = self._finished is not None and self._finished(row, self.texts[row])",
    "if not self._ended[row]:\n"
    "    new[row].append(token)\n"
    "    self.texts[row].append(token)\n"
    "    self._ended[row] = token in self._eos_ids",
    **GENERATE,
)
both(
    "drawn for the position before",
    (
        "engine.decoding:decode_step",
        "sample(logits[:, 0], sampling, key, numbers, new_cache.length)",
        "sample(logits[:, 0], sampling, key, numbers, new_cache.length - 1)",
    ),
    (
        "engine.decoding:decode_step",
        "sample(logits[:, 0], sampling, key, numbers, cache.length)",
        "sample(logits[:, 0], sampling, key, numbers, cache.length - 1)",
    ),
    **GENERATE,
)
torch(
    "drawn for the padded position",
    "engine.decoding:decode_step",
    "sample(logits[:, 0], sampling, key, numbers, cache.length)",
    "sample(logits[:, 0], sampling, key, numbers, cache.length.max().expand(cache.length.shape))",
    **GENERATE,
)
jax(
    "texts numbered from 1",
    "engine.generate:generate_stream",
    "np.arange(b, dtype=np.int32) if numbers is None else np.array(numbers, np.int32)",
    "1 + np.arange(b, dtype=np.int32)",
    **GENERATE,
)
