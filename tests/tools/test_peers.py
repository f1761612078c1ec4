"""The peers of `benchmark.py` that are not on the package index, or not whole: what is missing is said, with what to
do.
"""

from pathlib import Path

import pytest
import torch

from llm_common.config import Recipe, preset
from llm_common.errors import UserError
from llm_tools.bench.peers import find_peer

ROOT = Path(__file__).parents[2]


def peer(name):
    return find_peer(str(ROOT / "examples" / f"peer_{name}.py"))


def test_gpt_fast_is_asked_for_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT_FAST", str(tmp_path))
    with pytest.raises(UserError, match="has no generate.py: set it to a clone"):
        peer("gpt_fast").decode(preset("1b"), "float32", torch.device("cpu"))


def test_what_a_peer_cannot_be_shaped_like_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="heads fill hidden_size"):
        peer("gpt_fast").decode(preset("tiny"), "float32", torch.device("cpu"))
    titan = peer("torchtitan")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps torchtitan"):
        titan.train(Recipe(preset("1b")), torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="a head of its own"):
        titan.train(Recipe(preset("demo")), torch.device("cpu"))
