"""Documents in one sequence: what each sees, where it begins anew, and that it is as if it stood alone."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from llm_common.config import preset
from parity.core.inputs import random_weights
from parity.sides.torch_side import TorchSide
from torch_llm.documents import inside_documents
from torch_llm.fast.attention import block_mask
from torch_llm.fast.kernels import make_kernels
from torch_llm.model import empty_model

IDS = np.array([[5, 1, 6, 7, 1, 1, 8, 9], [1, 5, 6, 7, 8, 9, 5, 1]])


def test_positions_begin_anew_after_the_separator():
    positions, mask = inside_documents(torch.tensor(IDS), 1)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    seen = np.asarray(mask)[:, 0].sum(-1)
    np.testing.assert_array_equal(seen, np.asarray(positions) + 1)
    assert np.asarray(mask)[0, 0, 4].tolist() == [False, False, True, True, True, False, False, False]
    _, narrow = inside_documents(torch.tensor(IDS), 1, window=2)
    np.testing.assert_array_equal(np.asarray(narrow)[:, 0].sum(-1), np.minimum(seen, 2))


def test_a_document_is_computed_as_if_it_stood_alone():
    cfg = preset("tiny")
    side, weights = TorchSide(cfg, "float64"), random_weights(cfg, 3)
    together = side.variant(separator=1).logits(weights, IDS)
    for row, start, end in ((0, 0, 2), (0, 2, 5), (0, 6, 8), (1, 0, 1), (1, 1, 8)):
        alone = side.logits(weights, IDS[row : row + 1, start:end])[0]
        np.testing.assert_allclose(together[row, start:end], alone, rtol=0, atol=1e-12)
    assert np.abs(side.logits(weights, IDS)[0, 2:5] - together[0, 2:5]).max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("window", "separator"), [(None, 1), (7, None), (7, 1)])
def test_a_mask_in_blocks_hides_the_same(window, separator, monkeypatch):
    family = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    cfg = dataclasses.replace(preset("tiny"), max_position_embeddings=256, **family)
    model = empty_model(cfg, torch.float64, "cpu", make_kernels("sdpa", separator=separator, block_masks=True))
    model.init_weights(0)
    ids = torch.tensor(np.random.default_rng(0).integers(1, 30, (2, 200)))  # more than a block of 128
    expected, seen = model(ids), []
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    monkeypatch.setattr("torch_llm.fast.attention.block_mask", lambda mask: seen.append(block_mask(mask)) or seen[-1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        torch.testing.assert_close(model(ids), expected, atol=1e-12, rtol=0)
    assert [mask.shape for mask in seen] == [(2, 1, 200, 200)]  # once for all layers
