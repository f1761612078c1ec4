"""Generating text: one pass over the prompts fills the cache, then one token at a time.

    here                                       torch_llm.engine.generate
    prefill, decode: compiled functions of     the same steps written into a cache
    a cache, which they return                 that they change
    generate_stream(model, params, ...)        generate_stream(model, ...)

B batch, P longest prompt, V vocab_size. Prompts may have different lengths: they are padded on the right. A text is
decided by its prompt, its number in `numbers` and the seed, never by the texts beside it.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_llm.engine.checkpoint import from_canonical, to_host
from jax_llm.engine.decoding import decode, decoding_params, prefill
from jax_llm.engine.device import matmul_precision, select_device, x64
from jax_llm.engine.diagnose import watch_outputs
from jax_llm.engine.plan import decoding_kernels
from jax_llm.model import CausalLM
from jax_llm.params import Params
from llm_common.config import ModelConfig, SamplingConfig
from llm_common.tensors import Tensors, bucket, check_prompts
from llm_common.text.drawn_texts import DrawnTexts, chunks_ahead, join

CHUNK = 16  # tokens drawn by one call of the compiled loop, after which the host looks at the texts


def generate_stream(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """Continue prompts by up to max_new_tokens each; yields the new ids of every text, some at a time.

    A text ends before an id in eos_ids, or once `finished(row, its ids)` says so. numbers: the number of each text,
    folded into its random bits; default: its row. chunk: ids between two looks of the host. An accelerator is given the
    next chunk before the host looks at the last one. Raises UserError for an empty prompt, an id outside the vocabulary
    or a text longer than the model's positions.
    """
    padded, lengths = check_prompts(prompts, model.cfg, max_new_tokens)
    b, limit = len(padded), model.cfg.max_position_embeddings
    slots = bucket(padded.shape[1] + max_new_tokens, limit)
    padded = np.pad(padded, ((0, 0), (0, bucket(padded.shape[1], limit) - padded.shape[1])))
    row_numbers = np.arange(b, dtype=np.int32) if numbers is None else np.array(numbers, np.int32)
    seed, sampling = np.uint32(sampling.seed), dataclasses.replace(sampling, seed=0)  # a value, not a program
    settings = {"model": model, "sampling": sampling}
    ahead = chunks_ahead(next(iter(params["model"]["norm"]["weight"].devices())).platform)
    cache, tokens = prefill(params, padded, lengths, row_numbers, seed, slots=slots, **settings)
    begun, total, pieces = 1, 0, deque([tokens[:, None]])
    explain = lambda row, ids: why_not_finite(model, params, [*padded[row, : lengths[row]], *ids])
    texts = DrawnTexts(b, eos_ids, finished, explain)
    while True:
        while len(pieces) <= ahead and begun < max_new_tokens:
            cache, tokens, piece = decode(params, cache, tokens, row_numbers, seed, n=chunk, **settings)
            pieces.append(piece)
            begun += chunk
        drawn = to_host(pieces.popleft())[:, : max_new_tokens - total]
        total += drawn.shape[1]
        yield texts.add(drawn.tolist())
        if texts.ended or total == max_new_tokens:
            return


def why_not_finite(model: CausalLM, params: Params, ids: Sequence[int]) -> str:
    """Which module's output is the first that is not finite for the ids of a text; for people."""
    _, found = watch_outputs(model, params, jnp.array([[int(i) for i in ids]]))
    return (
        f"the logits after {len(ids)} tokens are not finite: {found or 'only with a cache'}; try another "
        "`compute_dtype`"
    )


def generate(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    numbers: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The whole of `generate_stream`: the new ids of each text, without the id that ended it."""
    stream = generate_stream(model, params, prompts, max_new_tokens, sampling, eos_ids, numbers, finished)
    return join(stream, len(prompts))


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, device: str = "auto", compute_dtype: str = "float32"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """Inside `with`: `generate_stream` of canonical weights on a device by name, its first two arguments filled in."""
    target = select_device(device)
    with jax.default_device(target), x64(compute_dtype), matmul_precision(compute_dtype):
        model = CausalLM(cfg, decoding_kernels(cfg, compute_dtype, target.platform))
        params = decoding_params(from_canonical(cfg, weights, jnp.dtype(compute_dtype)))
        yield partial(generate_stream, model, params)
