"""Documents in one sequence: what each sees, where it begins anew, and that it is as if it stood alone."""

import jax.numpy as jnp
import numpy as np

from jax_llm.documents import inside_documents
from llm_common.config import preset
from parity.core.inputs import random_weights
from parity.sides.jax_side import JaxSide

IDS = np.array([[5, 1, 6, 7, 1, 1, 8, 9], [1, 5, 6, 7, 8, 9, 5, 1]])


def test_positions_begin_anew_after_the_separator():
    positions, mask = inside_documents(jnp.array(IDS), 1)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    seen = np.asarray(mask)[:, 0].sum(-1)
    np.testing.assert_array_equal(seen, np.asarray(positions) + 1)
    assert np.asarray(mask)[0, 0, 4].tolist() == [False, False, True, True, True, False, False, False]
    _, narrow = inside_documents(jnp.array(IDS), 1, window=2)
    np.testing.assert_array_equal(np.asarray(narrow)[:, 0].sum(-1), np.minimum(seen, 2))


def test_a_document_is_computed_as_if_it_stood_alone():
    cfg = preset("tiny")
    side, weights = JaxSide(cfg, "float64"), random_weights(cfg, 3)
    together = side.variant(separator=1).logits(weights, IDS)
    for row, start, end in ((0, 0, 2), (0, 2, 5), (0, 6, 8), (1, 0, 1), (1, 1, 8)):
        alone = side.logits(weights, IDS[row : row + 1, start:end])[0]
        np.testing.assert_allclose(together[row, start:end], alone, rtol=0, atol=1e-12)
    assert np.abs(side.logits(weights, IDS)[0, 2:5] - together[0, 2:5]).max() > 1e-6
