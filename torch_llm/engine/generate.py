"""Generating text: one pass over the prompts fills the cache, then one token at a time.

    here                                       jax_llm.engine.generate
    steps written into a cache that            prefill, decode: compiled functions of
    they change                                a cache, which they return
    generate_stream(model, ...)                generate_stream(model, params, ...)

B batch, P longest prompt, V vocab_size. Prompts may have different lengths: they are padded on the right. A text is
decided by its prompt, its number in `numbers` and the seed, never by the texts beside it.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from llm_common.config import ModelConfig, SamplingConfig
from llm_common.tensors import Tensors, bucket, check_prompts
from llm_common.text.drawn_texts import DrawnTexts, chunks_ahead, join
from torch_llm import random_bits
from torch_llm.engine.checkpoint import from_canonical
from torch_llm.engine.decoding import CAPTURED_PROMPTS, CapturedSteps, GraphCache, decode_step, fuse_projections
from torch_llm.engine.device import matmul_precision, select_device, to_host_later
from torch_llm.engine.diagnose import watch_outputs
from torch_llm.engine.plan import decoding_kernels
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalLM, empty_model

CHUNK = 16  # tokens drawn between two looks of the host at the texts


def generate_stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
    programs: GraphCache | None = None,
) -> Iterator[list[list[int]]]:
    """Continue prompts by up to max_new_tokens each; yields the new ids of every text, some at a time.

    A text ends before an id in eos_ids, or once `finished(row, its ids)` says so. numbers: the number of each text,
    folded into its random bits; default: its row. chunk: ids between two looks of the host. An accelerator is given the
    next chunk before the host looks at the last one. programs: to capture the steps of a GPU in, None to run them one
    by one. Raises UserError for an empty prompt, an id outside the vocabulary or a text longer than the model's
    positions.
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
    ahead = chunks_ahead(device.type)
    begun, total, pieces = 1, 0, deque([to_host_later(tokens[:, None])])
    explain = lambda row, ids: why_not_finite(model, [*padded[row, : lengths[row]], *ids])
    texts = DrawnTexts(b, eos_ids, finished, explain)
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
        yield texts.add(drawn.tolist())
        if texts.ended or total == max_new_tokens:
            return


@torch.no_grad()
def why_not_finite(model: CausalLM, ids: Sequence[int]) -> str:
    """Which module's output is the first that is not finite for the ids of a text; for people."""
    inputs = torch.tensor([[int(i) for i in ids]], device=model.model.norm.weight.device)
    _, found = watch_outputs(model, lambda: model(inputs))
    return (
        f"the logits after {len(ids)} tokens are not finite: {found or 'only with a cache'}; try another "
        "`compute_dtype`"
    )


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
    stream = generate_stream(model, prompts, max_new_tokens, sampling, eos_ids, numbers, finished)
    return join(stream, len(prompts))


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, device: str = "auto", compute_dtype: str = "float32", compile: str = "auto"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """Inside `with`: `generate_stream` of canonical weights on a device by name, its first argument filled in.

    compile: on a GPU steps are captured; "on" compiles them before, which takes one to three minutes and pays for long
    texts.
    """
    target = select_device(device)
    model = empty_model(cfg, getattr(torch, compute_dtype), target, decoding_kernels(compute_dtype))
    model = fuse_projections(from_canonical(model, weights))
    programs = GraphCache(compile == "on") if target.type == "cuda" and compile != "off" else None
    with matmul_precision(compute_dtype):
        yield partial(generate_stream, model.requires_grad_(False), programs=programs)
