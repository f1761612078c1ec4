"""The decoder-only language model, and its initial weights.

B batch, T positions, S cache slots, D hidden_size, V vocab_size, L layers.

`state_dict()` holds exactly the canonical tensors: tables and caches are not parameters, a tied head has no weight.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from llm_common.config import ModelConfig, check_length
from llm_common.tensors import init_constant, init_range, tensor_shapes
from torch_llm import random_bits
from torch_llm.attention import Attention, Place, causal_mask, project_qkv, reference_attention
from torch_llm.kernels import Kernels
from torch_llm.kv_cache import KVCache
from torch_llm.layers import MLP, Embedding, Linear, RMSNorm, embedding, gate_and_up, linear, rms_norm, swiglu, upcast
from torch_llm.loss import cross_entropy
from torch_llm.rope import RotaryTable


class CausalPlaces:
    """The place of every layer: a query sees what precedes it, in the sequence or the cache. Owns the rotary table."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg, self.rotary_table = cfg, RotaryTable(cfg)

    def __call__(self, input_ids: Tensor, cache: KVCache | None, dtype: torch.dtype) -> Callable[[int], Place]:
        """For ids (B, T). dtype: of the rotary table."""
        t, window = input_ids.shape[1], self.cfg.sliding_window
        if cache is None:
            check_length(self.cfg, t, "the input")
            positions, mask = torch.arange(t, device=input_ids.device), None
        else:
            positions = cache.positions(t)  # (B, T)
            slots = torch.arange(cache.in_use(t), device=input_ids.device)
            mask = causal_mask(positions, slots, window)[:, None]  # (B, 1, T, S)
        place = Place(*self.rotary_table(positions, dtype), mask, window)
        return lambda layer: place


def run_layer(layer: nn.Module, x: Tensor, place: Place, cache: KVCache | None, i: int) -> Tensor:
    """Layer i: x (B, T, D) to x."""
    return layer(x, place, cache, i)


def mean_loss(model: "CausalLM", inputs: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """Sum of the losses in nats of inputs and targets (B, T), over `count`."""
    return cross_entropy(model(inputs), targets, count)


class DecoderLayer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, kernels.norm)
        self.self_attn = Attention(cfg, kernels)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, kernels.norm)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, kernels)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), place, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


PLAIN = Kernels(
    linear=linear,
    embedding=embedding,
    norm=rms_norm,
    activation=swiglu,
    attention=reference_attention,
    qkv=project_qkv,
    gate_up=gate_and_up,
    places=CausalPlaces,
    block=DecoderLayer,
    layer=run_layer,
    loss=mean_loss,
)


class Transformer(nn.Module):
    """Embedding, L decoder layers and the final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, cfg: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, kernels)
        self.layers = nn.ModuleList(kernels.block(cfg, kernels) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, kernels.norm)
        self.places = kernels.places(cfg)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        place = self.places(input_ids, cache, upcast(x[:0]).dtype)
        for i, layer in enumerate(self.layers):
            x = self.kernels.layer(layer, x, place(i), cache, i)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x)


class CausalLM(nn.Module):
    """The transformer and its head: token ids (B, T) to logits (B, T, V) in the weights' dtype.

    With `last` (B,), an index of a position of each text, only the logits there are computed: (B, 1, V).
    """

    def __init__(self, cfg: ModelConfig, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.cfg, self.kernels = cfg, kernels
        self.model = Transformer(cfg, kernels)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size, kernels.linear)

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


def empty_model(cfg: ModelConfig, dtype: torch.dtype, device: torch.device | str, kernels: Kernels = PLAIN) -> CausalLM:
    """A model made directly on its device, its weights still to be filled in."""
    with torch.device("meta"):
        model = CausalLM(cfg, kernels).to(dtype)
    return model.to_empty(device=device)


def init_model(
    cfg: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: Kernels = PLAIN,
) -> CausalLM:
    """A model with the initial weights of `seed`."""
    return empty_model(cfg, dtype, device, kernels).init_weights(seed)
