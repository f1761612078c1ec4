"""The page of equations and twins is made from the source, and the one in docs/ is up to date."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "scripts" / "side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), "run: make docs"


def test_a_changed_source_makes_another_page(script, monkeypatch):
    before = script.render()
    source = script.source
    monkeypatch.setattr(
        script, "source", lambda package, name: (source(package, name)[0], source(package, name)[1] + "\n# new")
    )
    assert script.render() != before


def test_a_definition_that_is_gone_is_named(script):
    with pytest.raises(KeyError, match="layers.py: no definition 'gone'"):
        script.source("jax_llm", "layers:gone")


def test_every_block_of_the_model_is_there(script):
    titles = {block.title for block in script.BLOCKS}
    assert {"Tokenizer", "Embedding", "RMSNorm", "Attention", "SwiGLU", "Training step", "Generation"} <= titles
