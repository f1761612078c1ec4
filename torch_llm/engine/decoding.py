"""One step of decoding: tokens into the cache, logits out of it, the next token drawn.

    here                                   jax_llm.engine.decoding
    steps that write into a cache; on a    prefill, decode: compiled functions
    GPU captured and played again          of a cache, which they return

B batch, P longest prompt, V vocab_size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_common.config import SamplingConfig
from llm_common.tensors import FUSED
from torch_llm import random_bits
from torch_llm.fast.products import fused_gate_up, fused_qkv
from torch_llm.kv_cache import KVCache
from torch_llm.layers import Linear, upcast
from torch_llm.model import CausalLM
from torch_llm.sampling import sample

CAPTURED_PROMPTS = 2**14  # tokens of prompts up to which a GPU would wait for the host, step by step


@torch.no_grad()
def fuse_projections(model: CausalLM) -> CausalLM:
    """The model with the weights that multiply the same input put side by side, so that one product replaces them.

    For decoding, whose products are too small to fill a GPU. Training gains nothing by it. The model is changed.
    """
    for layer in model.model.layers:
        for block, (fused, *names) in FUSED.items():
            module: Any = layer.get_submodule(block)
            parts = [module.get_submodule(name) for name in names]
            with torch.device("meta"):
                one = Linear(1, 1, bias=parts[0].bias is not None)
            for name, _ in list(one.named_parameters()):
                side_by_side = torch.cat([part.get_parameter(name) for part in parts])
                setattr(one, name, nn.Parameter(side_by_side, requires_grad=False))
            setattr(module, fused, one)
            for name in names:
                delattr(module, name)
            module.kernels = replace(module.kernels, qkv=fused_qkv, gate_up=fused_gate_up)
    return model


@torch.no_grad()
def decode_step(
    model: CausalLM,
    cache: KVCache,
    tokens: Tensor,
    key: Tensor,
    numbers: Tensor,
    sampling: SamplingConfig,
    lengths: Tensor | None = None,
) -> Tensor:
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: ids (B,), -1 where the logits
    are not finite.

    lengths (B,): how many of the T tokens are each text's own, if they are padded.
    """
    t = tokens.shape[1]
    last = torch.full_like(cache.length, t - 1) if lengths is None else lengths - 1
    length = cache.length + last + 1
    logits = model(tokens.clamp(min=0), cache, last)
    cache.set_length(length)
    drawn = sample(logits[:, 0], sampling, key, numbers, cache.length)
    return torch.where(torch.isfinite(logits[:, 0].amax(-1)), drawn, -1)


class CapturedSteps:
    """`decode_step` as CUDA graphs, one for each number of tokens, which are played with nothing asked of the host
    between.

    They read and write at fixed places: the cache, the key and the numbers of the texts, and each its tokens. A device
    without such graphs takes the steps one by one, at the same places.
    """

    def __init__(self, model: CausalLM, batch_size: int, slots: int, sampling: SamplingConfig, compile: bool) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.sampling, self.compile, self.device = model, sampling, compile, weight.device
        self.cache = KVCache(model.cfg, batch_size, slots, weight.dtype, self.device, static=True)
        self.numbers, self.key = torch.zeros_like(self.cache.length), random_bits.key(0, self.device)
        # made here, not while capturing
        model.model.places.rotary_table(self.numbers[:, None], upcast(weight[:0]).dtype)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.no_grad()
    def capture(self, t: int) -> None:
        """Make the graph of t tokens a text, unless it is there. What is in the cache is lost."""
        if t in self.graphs:
            return
        tokens = torch.zeros(len(self.numbers), t, dtype=torch.int64, device=self.device)
        lengths = torch.full_like(self.numbers, t)
        # the search for the fastest matrix-vector products takes a minute or two, and pays where there is no matrix of
        # texts; where there is one, small kernels that do not depend on each other are joined
        search = {"coordinate_descent_tuning": True, "coordinate_descent_search_radius": 2}
        options: dict[str, Any] = search if tokens.numel() == 1 else {"combo_kernels": True}
        step = torch.compile(decode_step, dynamic=False, options=options) if self.compile else decode_step

        def run() -> None:
            drawn = step(self.model, self.cache, tokens, self.key, self.numbers, self.sampling, lengths)
            tokens[:, 0].copy_(drawn)

        play = run if self.pool is None else self._recorded(run)
        self.graphs[t] = play, tokens, lengths

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        """What `run` asks of the device, as a graph."""
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes the libraries' own buffers
                self.cache.set_length(torch.zeros_like(self.numbers))
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        return graph.replay

    def start(self, key: Tensor, numbers: Tensor) -> None:
        """Empty the cache for new texts."""
        self.key.copy_(key)
        self.numbers.copy_(numbers)
        self.cache.set_length(torch.zeros_like(self.numbers))

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The ids (B,) that follow tokens (B, T). lengths (B,): how many tokens are each text's own; None: as many as
        in the call before.
        """
        play, own_tokens, own_lengths = self.graphs[tokens.shape[1]]
        own_tokens.copy_(tokens)
        if lengths is not None:
            own_lengths.copy_(lengths)
        play()
        return own_tokens[:, 0].clone()


class GraphCache(dict[tuple[int, int, SamplingConfig], CapturedSteps]):
    """Captured steps by batch size, slots and settings of the sampler, to be used again. compile: with
    torch.compile.
    """

    def __init__(self, compile: bool) -> None:
        super().__init__()
        self.compile = compile
