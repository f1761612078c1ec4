"""A multilayer perceptron in Flax and in PyTorch: everything is matched by itself, kernels are found transposed.

parity pair examples/mlp.py, or python examples/mlp.py
"""

import flax.linen as linen
import jax
import numpy as np
import optax
import torch

from parity.pair import Pair


class MLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.gelu(
            linen.Dense(64, name="fc1")(x), approximate=False
        )  # Flax's default is the tanh form, torch's is not
        return linen.Dense(10, name="fc2")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))  # 1e-6 in Flax, 1e-5 in torch


class TorchMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = torch.nn.Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.fc2(self.norm(torch.nn.functional.gelu(self.fc1(x))))


x = np.random.default_rng(0).standard_normal((5, 32))
params = MLP().init(jax.random.key(0), x.astype(np.float32))
optimizers = (optax.sgd(1e-2, momentum=0.9), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9))
mlp = Pair(MLP(), TorchMLP(), inputs=[x], params=params, optimizers=optimizers, name="MLP")

if __name__ == "__main__":
    mlp.compare().show()
