"""Properties of the torch sampler and of generation. The twin is tests/lesson/test_jax_sampling.py."""

import numpy as np
import pytest
import torch

from llm_common.config import SamplingConfig, preset
from llm_common.errors import UserError
from parity.core.inputs import random_weights
from torch_llm import random_bits, sampling
from torch_llm.engine.checkpoint import from_canonical
from torch_llm.engine.generate import generate, generate_stream, generator
from torch_llm.model import CausalLM

CFG = preset("tiny")
LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.4, 0.05]]))  # ties at the top and at the bottom


def kept(**settings) -> list[int]:
    return torch.isfinite(sampling.filter_logits(LOGITS, SamplingConfig(**settings))[0]).nonzero().flatten().tolist()


def test_filters():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1]  # exactly k, the lowest id of a tie
    assert kept(top_k=4) == [0, 1, 2, 3]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.3) == [1]  # the token that crosses p is kept
    assert kept(top_p=0.75) == [1, 3]
    assert kept(top_p=0.85) == [0, 1, 3]
    assert kept(top_k=2, top_p=0.6) == [1, 3]  # renormalised after top-k: 0.5 + 0.5
    assert kept(top_k=2, top_p=0.45) == [1]
    assert kept(min_p=0.2) == [0, 1, 3]
    assert kept(min_p=0.3) == [1, 3]
    assert kept(top_p=0.5, temperature=5.0) == [0, 1, 3]  # the temperature comes first and flattens


def test_greedy_takes_the_lowest_id_of_a_tie():
    ids = torch.zeros(1, dtype=torch.long)
    assert sampling.sample(LOGITS, SamplingConfig(temperature=0.0), random_bits.key(0), ids, ids)[0] == 1


def test_draws_follow_the_distribution():
    n = 20_000
    rows, positions = torch.zeros(n, dtype=torch.long), torch.arange(n)
    drawn = sampling.sample(LOGITS.expand(n, 5), SamplingConfig(), random_bits.key(7), rows, positions)
    share = np.bincount(drawn.numpy(), minlength=5) / n
    # five standard deviations of a share near 0.4: 5 x sqrt(0.24 / 20,000)
    np.testing.assert_allclose(share, np.exp(LOGITS[0].numpy()), atol=0.0174)


def test_draws_depend_on_seed_row_and_position():
    logits = torch.zeros(1, 10_000)
    draw = lambda seed, row, position: int(
        sampling.sample(logits, SamplingConfig(), random_bits.key(seed), torch.tensor([row]), torch.tensor([position]))[
            0
        ]
    )
    assert len({draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1), draw(0, 1, 1)}) == 5
    assert draw(0, 3, 4) == draw(0, 3, 4)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return from_canonical(CausalLM(CFG), random_weights(CFG, 0))


PROMPT = np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3]])


def test_a_text_does_not_depend_on_its_batch_mates(model):
    settings = SamplingConfig(seed=3)
    texts = generate(model, PROMPT, 12, settings)
    assert generate(model, PROMPT[:1], 12, settings) == texts[:1]
    assert texts[0] != texts[2]  # the same prompt in another row draws with other numbers
    greedy = generate(model, PROMPT, 12, SamplingConfig(temperature=0.0))
    assert greedy[0] == greedy[2]


def test_prompts_of_different_lengths_in_one_batch(model):
    """Each text is what its prompt gives alone, with the same number; the texts are longer than a chunk."""
    prompts, settings = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]], SamplingConfig(seed=5)
    texts = generate(model, prompts, 40, settings, numbers=[4, 0, 4])
    for prompt, number, text in zip(prompts, [4, 0, 4], texts, strict=True):
        assert generate(model, [prompt], 40, settings, numbers=[number]) == [text]
    assert len({tuple(text) for text in texts}) == 3


def test_a_text_ends_when_the_host_says_so(model):
    prompts, settings = [[1, 2], [3]], SamplingConfig(seed=5)
    whole = generate(model, prompts, 40, settings)
    cut = generate(model, prompts, 40, settings, finished=lambda row, ids: row == 1 and len(ids) == 19)
    assert cut == [whole[0], whole[1][:19]]
    pieces = list(generate_stream(model, prompts, 40, settings, chunk=3))
    assert [[i for piece in pieces for i in piece[row]] for row in (0, 1)] == whole
    assert [len(piece[0]) for piece in pieces] == [1] + [3] * 13


def test_end_of_text_ends_a_text_and_is_not_in_it(model):
    settings = SamplingConfig(seed=3)
    texts = generate(model, PROMPT, 12, settings)
    eos = texts[1][4]
    stopped = generate(model, PROMPT, 12, settings, eos_ids=(eos,))
    assert stopped[1] == texts[1][: texts[1].index(eos)]
    assert all(eos not in text for text in stopped)
    assert all(a == b[: len(a)] for a, b in zip(stopped, texts, strict=True))


@pytest.mark.parametrize(
    ("prompt", "n", "words"),
    [
        (np.zeros((1, 0), int), 4, "prompt 0 must be a list of at least one token id"),
        (np.zeros(3, int), 4, "prompt 0 must be a list of at least one token id"),
        ([[1, 2], []], 4, "prompt 1 must be a list of at least one token id"),
        ([], 4, "no prompt"),
        (np.zeros((1, 3), int), 0, "max_new_tokens = 0 must be at least 1"),
        (np.array([[96]]), 4, "prompt 0: token id 96 is outside the vocabulary"),
        (np.array([[-1]]), 4, "prompt 0: token id -1"),
        (np.array([[1.5]]), 4, "must be integers"),
        (np.zeros((1, 60), int), 5, "a prompt of 60 tokens and `max_new_tokens` = 5 needs 65 positions"),
    ],
)
def test_bad_prompts_are_refused(prompt, n, words, model):
    with pytest.raises(UserError, match=words):
        generate(model, prompt, n, SamplingConfig())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_generation_from_canonical_weights(dtype):
    with generator(CFG, random_weights(CFG, 0), "cpu", dtype) as stream:
        pieces = list(stream(PROMPT, 5, SamplingConfig()))
    assert [sum(len(piece[row]) for piece in pieces) for row in range(3)] == [5, 5, 5]
    with pytest.raises(UserError, match="'tpu'"), generator(CFG, random_weights(CFG, 0), "tpu"):
        pass
