"""Our JAX model against `transformers`: the stacked layers are found one by one, and the trace knows every module.
In float32: transformers computes norms and rotary angles in float32 whatever it is given, as a trace in float64 tells.

parity pair examples/against_transformers.py, or python examples/against_transformers.py
"""

import jax
import numpy as np
import torch
import transformers

from jax_llm.engine.checkpoint import from_canonical
from jax_llm.model import CausalLM
from llm_common.config import preset
from parity.core.inputs import random_weights
from parity.pair import Pair


class Logits(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.llama = transformers.LlamaForCausalLM(config)

    def forward(self, ids):
        return self.llama(ids).logits


cfg = preset("tiny")
ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 11))
config = transformers.LlamaConfig(
    **{k: v for k, v in cfg.to_hf().items() if k != "architectures"}, attn_implementation="eager"
)
with jax.enable_x64(True):
    params = from_canonical(cfg, random_weights(cfg, seed=0))
llama = Pair(
    lambda p, ids: CausalLM(cfg).apply({"params": p}, ids)[0],
    Logits(config),
    inputs=[ids],
    params=params,
    name="Llama",
    dtypes=["float32"],
)

if __name__ == "__main__":
    llama.compare().show()
