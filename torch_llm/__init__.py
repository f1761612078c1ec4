"""The language model as objects: modules own parameters, the optimizer owns its state, the trainer owns both.

Read in this order: layers, rope, attention, model, loss, optim, sampling. The twin of every file is in `jax_llm`.
`engine` trains and generates; `fast` has the same numbers, quicker.
"""

from torch_llm.kernels import Kernels
from torch_llm.loss import cross_entropy
from torch_llm.model import PLAIN, CausalLM, init_model
from torch_llm.optim import AdamW, make_optimizer
from torch_llm.sampling import sample

__all__ = ["PLAIN", "AdamW", "CausalLM", "Kernels", "cross_entropy", "init_model", "make_optimizer", "sample"]
