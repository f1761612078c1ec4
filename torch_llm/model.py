"""The decoder-only language model, and its initial weights.

B batch, T positions, S cache slots, D hidden_size, V vocab_size, L layers.

`remat` says what a layer's backward pass computes again instead of keeping it from the forward pass. "none": nothing;
"dots": all but the matrix products; "full": everything but the layer's input.

`state_dict()` holds exactly the canonical tensors: tables and caches are not parameters, a tied head has no weight.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llm_common.config import ModelConfig, Separator, check_length
from llm_common.tensors import init_constant, init_range, tensor_shapes
from torch_llm import random_bits
from torch_llm.attention import Attention, Mask, causal_mask, in_blocks, takes_blocks
from torch_llm.documents import inside_documents
from torch_llm.kv_cache import KVCache
from torch_llm.layers import MLP, Embedding, Linear, RMSNorm, upcast
from torch_llm.rope import RotaryTable

MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # those without a batch axis
REMAT_OPTIONS = {
    "full": {},
    "dots": {"context_fn": partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)},
}


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, backend: str = "reference") -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, backend)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, L decoder layers and the final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(
        self, cfg: ModelConfig, backend: str = "reference", remat: str = "none", separator: Separator = None
    ) -> None:
        super().__init__()
        self.cfg, self.backend, self.remat = cfg, backend, remat
        self.separator = separator  # the id that ends a document, if none may see another
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg, backend) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.rotary_table = RotaryTable(cfg)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        b, t, table_dtype, window = *input_ids.shape, upcast(x[:0]).dtype, self.cfg.sliding_window
        if cache is None:
            check_length(self.cfg, t, "the input")
            blocks = (
                takes_blocks(self.backend, x.device.type, x.dtype, self.cfg.head_dim) and torch.compiler.is_compiling()
            )
            positions, mask = torch.arange(t, device=x.device), None
            if self.separator is not None:
                positions, mask = inside_documents(input_ids, self.separator, window)
            elif blocks and window is not None and window < t:
                mask = causal_mask(positions, positions, window).expand(b, 1, t, t)
            mask = in_blocks(mask) if blocks and mask is not None else mask
        else:
            positions = cache.positions(t)  # (B, T)
            slots = torch.arange(cache.in_use(t), device=x.device)
            mask = causal_mask(positions, slots, window)[:, None]  # (B, 1, T, S)
        cos, sin = self.rotary_table(positions, table_dtype)
        for i, layer in enumerate(self.layers):
            if self.remat != "none" and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, **REMAT_OPTIONS[self.remat])
            else:
                x = layer(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.advance(t)
        return self.norm(x)


class CausalLM(nn.Module):
    """The transformer and its head: token ids (B, T) to logits (B, T, V) in the weights' dtype.

    With `last` (B,), an index of a position of each text, only the logits there are computed: (B, 1, V).
    """

    def __init__(
        self, cfg: ModelConfig, backend: str = "reference", remat: str = "none", separator: Separator = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Transformer(cfg, backend, remat, separator)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, last: Tensor | None = None) -> Tensor:
        x = self.model(input_ids, cache)
        if last is not None:
            x = torch.take_along_dim(x, last[:, None, None], dim=1)  # (B, 1, D)
        return self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

    def head_weight(self) -> Tensor:
        """The head's matrix (V, D): its own, or the embedding's if it is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> "CausalLM":
        """Initial weights, bit-identical to JAX's from the same seed, rounded to the model's dtype."""
        parameters = dict(self.named_parameters())
        for name, x in initial_tensors(self.cfg, seed, upcast(self.model.norm.weight[:0]).dtype, parameters):
            parameters[name].copy_(x)
        return self


def initial_tensors(
    cfg: ModelConfig, seed: int, dtype: torch.dtype, like: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The initial weights in `dtype`, one by one, by canonical name: uniform, keyed by the name's index.

    like: tensors of these names, for their devices.
    """
    for i, (name, shape) in enumerate(tensor_shapes(cfg).items()):
        device, width = like[name].device, init_range(cfg, name)
        if width is None:
            yield name, torch.full(shape, init_constant(name), dtype=dtype, device=device)
            continue
        key = random_bits.fold_in(random_bits.key(seed, device), i)
        u = random_bits.uniform(random_bits.random_bits(key, math.prod(shape)), dtype)
        yield name, ((u - 0.5) * torch.tensor(width, dtype=dtype)).reshape(shape)


def empty_model(
    cfg: ModelConfig,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    remat: str = "none",
    separator: Separator = None,
) -> CausalLM:
    """A model made directly on its device, its weights still to be filled in."""
    with torch.device("meta"):
        model = CausalLM(cfg, backend, remat, separator).to(dtype)
    return model.to_empty(device=device)


def init_model(
    cfg: ModelConfig, seed: int, backend: str, dtype: torch.dtype, device: torch.device | str, remat: str = "none"
) -> CausalLM:
    """A model with the initial weights of `seed`."""
    return empty_model(cfg, backend, dtype, device, remat).init_weights(seed)
