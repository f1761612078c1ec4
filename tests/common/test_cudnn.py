import dataclasses

import pytest

from llm_common.config import preset
from llm_common.cudnn import why_not_cudnn

FITS = preset("1b")  # head_dim 64


@pytest.mark.parametrize(
    ("change", "dtype", "length", "words"),
    [
        ({}, "bfloat16", 64, ""),
        ({}, "bfloat16", 0, ""),
        ({}, "float32", 64, "bfloat16, not float32"),
        ({"head_dim": 10}, "bfloat16", 64, "not 10"),
        ({"head_dim": 256}, "bfloat16", 64, "not 256"),
        ({}, "bfloat16", 63, "not 63"),
        ({"model_type": "mistral", "sliding_window": 32}, "bfloat16", 64, ""),
    ],
)
def test_why_cudnn_attention_is_not_taken(change, dtype, length, words):
    reason = why_not_cudnn(dataclasses.replace(FITS, **change), dtype, length)
    assert words in reason
    assert bool(words) == bool(reason)
