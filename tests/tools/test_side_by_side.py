"""The page of equations and twins is made from the source, and the one in docs/ is up to date."""

import pytest

from llm_tools import side_by_side as script


def test_the_page_is_fresh():
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), "run: make docs"


def test_a_changed_source_makes_another_page(monkeypatch):
    before = script.render()
    source = script.source
    monkeypatch.setattr(
        script, "source", lambda package, name: (source(package, name)[0], source(package, name)[1] + "\n# new")
    )
    assert script.render() != before


def test_a_definition_that_is_gone_is_named():
    with pytest.raises(KeyError, match="layers.py: no definition 'gone'"):
        script.source("jax_llm", "layers:gone")


def test_every_block_of_the_model_is_there():
    titles = {block.title for block in script.BLOCKS}
    assert {"Tokenizer", "Embedding", "RMSNorm", "Attention", "SwiGLU", "Training step", "Generation"} <= titles
