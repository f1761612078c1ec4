"""Generating text: one pass over the prompts fills the cache, then one token at a time.

    here                                       jax_llm.generate
    steps written into a cache that            prefill, decode: compiled functions of
    they change                                a cache, which they return
    generate_stream(model, ...)                generate_stream(model, params, ...)

B batch, P longest prompt, V vocab_size. Prompts may have different lengths: they are padded on the right. A text is decided by
its prompt, its number in `numbers` and the seed, never by the texts beside it.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_common.config import ModelConfig, SamplingConfig
from llm_common.errors import UserError
from llm_common.tensors import FUSED, Tensors, bucket, check_prompts
from torch_llm import random_bits
from torch_llm.checkpoint import from_canonical
from torch_llm.fast.attention import resolve_backend
from torch_llm.fast.kernels import make_kernels
from torch_llm.fast.products import fused_gate_up, fused_qkv
from torch_llm.kv_cache import KVCache
from torch_llm.layers import Linear, upcast
from torch_llm.model import CausalLM, empty_model
from torch_llm.sampling import sample
from torch_llm.train import matmul_precision, select_device, to_host_later, watch_outputs

CHUNK = 16  # tokens drawn between two looks of the host at the texts
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
    """Feed tokens (B, T) at the cache's next positions and draw the token that follows: ids (B,), -1 where the logits are not finite.

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
    """`decode_step` as CUDA graphs, one for each number of tokens, which are played with nothing asked of the host between.

    They read and write at fixed places: the cache, the key and the numbers of the texts, and each its tokens.
    """

    def __init__(self, model: CausalLM, batch_size: int, slots: int, sampling: SamplingConfig, compile: bool) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.sampling, self.compile, self.device = model, sampling, compile, weight.device
        self.cache = KVCache(model.cfg, batch_size, slots, weight.dtype, self.device, static=True)
        self.numbers, self.key = torch.zeros_like(self.cache.length), random_bits.key(0, self.device)
        # made here, not while capturing
        model.model.places.rotary_table(self.numbers[:, None], upcast(weight[:0]).dtype)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def capture(self, t: int) -> None:
        """Make the graph of t tokens a text, unless it is there. What is in the cache is lost."""
        if t in self.graphs:
            return
        tokens = torch.zeros(len(self.numbers), t, dtype=torch.int64, device=self.device)
        lengths = torch.full_like(self.numbers, t)
        # the search for the fastest matrix-vector products takes a minute or two, and pays where there is no matrix of texts; where
        # there is one, small kernels that do not depend on each other are joined
        search = {"coordinate_descent_tuning": True, "coordinate_descent_search_radius": 2}
        options: dict[str, Any] = search if tokens.numel() == 1 else {"combo_kernels": True}
        step = torch.compile(decode_step, dynamic=False, options=options) if self.compile else decode_step

        def run() -> None:
            drawn = step(self.model, self.cache, tokens, self.key, self.numbers, self.sampling, lengths)
            tokens[:, 0].copy_(drawn)

        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes the libraries' own buffers
                self.cache.set_length(torch.zeros_like(self.numbers))
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        self.graphs[t] = graph, tokens, lengths

    def start(self, key: Tensor, numbers: Tensor) -> None:
        """Empty the cache for new texts."""
        self.key.copy_(key)
        self.numbers.copy_(numbers)
        self.cache.set_length(torch.zeros_like(self.numbers))

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The ids (B,) that follow tokens (B, T), of which `lengths` (B,) are each text's own, as they were before if not given."""
        graph, own_tokens, own_lengths = self.graphs[tokens.shape[1]]
        own_tokens.copy_(tokens)
        if lengths is not None:
            own_lengths.copy_(lengths)
        graph.replay()
        return own_tokens[:, 0].clone()


class Programs(dict[tuple[int, int, SamplingConfig], CapturedSteps]):
    """Captured steps by batch size, slots and settings of the sampler, to be used again. compile: with torch.compile."""

    def __init__(self, compile: bool) -> None:
        super().__init__()
        self.compile = compile


def generate_stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
    programs: Programs | None = None,
) -> Iterator[list[list[int]]]:
    """Continue prompts by up to max_new_tokens each; yields the new ids of every text, some at a time.

    A text ends before an id in eos_ids, or once `finished(row, its ids)` says so. numbers: the number of each text, folded
    into its random bits; default: its row. chunk: ids between two looks of the host. An accelerator is given the next chunk
    before the host looks at the last one. programs: to capture the steps of a GPU in, None to run them one by one.
    Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's positions.
    """
    padded, lengths = check_prompts(prompts, model.cfg, max_new_tokens)
    b, weight, slots = len(padded), model.model.embed_tokens.weight, padded.shape[1] + max_new_tokens
    device = weight.device
    row_numbers = torch.arange(b, device=device) if numbers is None else torch.tensor(numbers, device=device)
    key, sampling = random_bits.key(sampling.seed, device), replace(sampling, seed=0)  # a value, not a program
    if programs is None:
        cache = KVCache(model.cfg, b, slots, weight.dtype, device)
        step = partial(decode_step, model, cache, key=key, numbers=row_numbers, sampling=sampling)
        prefill = step
    else:
        limit = model.cfg.max_position_embeddings
        program = b, bucket(slots, limit), sampling
        if program not in programs:
            programs[program] = CapturedSteps(model, *program, programs.compile)
        step = prefill = programs[program]
        padded = np.pad(padded, ((0, 0), (0, bucket(padded.shape[1], limit) - padded.shape[1])))
        step.capture(1)
        if padded.size <= CAPTURED_PROMPTS:
            step.capture(padded.shape[1])
        else:
            prefill = partial(decode_step, model, step.cache, key=key, numbers=row_numbers, sampling=sampling)
        step.start(key, row_numbers)
    ids, own = (torch.tensor(x, device=device).long() for x in (padded, lengths))
    tokens = prefill(ids, lengths=own)
    ahead = 1 if device.type == "cuda" else 0
    begun, total, pieces = 1, 0, deque([to_host_later(tokens[:, None])])
    texts: list[list[int]] = [[] for _ in range(b)]
    done = [False] * b
    while True:
        while len(pieces) <= ahead and begun < max_new_tokens:
            columns = []
            for _ in range(min(chunk, max_new_tokens - begun)):
                tokens = step(tokens[:, None])
                columns.append(tokens)
            pieces.append(to_host_later(torch.stack(columns, dim=1)))
            begun += len(columns)
        drawn = pieces.popleft()()
        total += drawn.shape[1]
        new: list[list[int]] = [[] for _ in range(b)]
        for row, ids in enumerate(drawn.tolist()):
            for token in ids:
                if token < 0 and not done[row]:
                    raise UserError(why_not_finite(model, [*padded[row, : lengths[row]], *texts[row]]))
                done[row] = done[row] or token in eos_ids
                if not done[row]:
                    new[row].append(token)
                    texts[row].append(token)
                    done[row] = finished is not None and finished(row, texts[row])
        yield new
        if all(done) or total == max_new_tokens:
            return


@torch.no_grad()
def why_not_finite(model: CausalLM, ids: Sequence[int]) -> str:
    """Which module's output is the first that is not finite for the ids of a text; for people."""
    inputs = torch.tensor([[int(i) for i in ids]], device=model.model.norm.weight.device)
    _, found = watch_outputs(model, lambda: model(inputs))
    return f"the logits after {len(ids)} tokens are not finite: {found or 'only with a cache'}; try another --compute-dtype"


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The whole of `generate_stream`: the new ids of each text, without the id that ended it."""
    texts: list[list[int]] = [[] for _ in prompts]
    for new in generate_stream(model, prompts, max_new_tokens, sampling, eos_ids, numbers, finished):
        for text, ids in zip(texts, new, strict=True):
            text += ids
    return texts


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, device: str = "auto", compute_dtype: str = "float32", compile: str = "auto"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """Inside `with`: `generate_stream` of canonical weights on a device by name, its first argument filled in.

    compile: on a GPU steps are captured; "on" compiles them before, which takes one to three minutes and pays for long texts.
    """
    target = select_device(device)
    backend = resolve_backend("auto", compute_dtype)
    model = empty_model(cfg, getattr(torch, compute_dtype), target, make_kernels(backend))
    model = fuse_projections(from_canonical(model, weights))
    programs = Programs(compile == "on") if target.type == "cuda" and compile != "off" else None
    with matmul_precision(compute_dtype):
        yield partial(generate_stream, model.requires_grad_(False), programs=programs)
