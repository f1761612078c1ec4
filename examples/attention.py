"""Flax's attention against torch.nn.MultiheadAttention, which keeps the three projections in one matrix: a map of
functions.

parity pair examples/attention.py, or python examples/attention.py
"""

import flax.linen as linen
import jax
import numpy as np
import torch

from parity.pair import Pair

D, HEADS = 24, 4


class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


def joined(part):  # Flax has (D, heads, head_dim) for each of query, key and value
    flat = {"kernel": lambda x: x.reshape(D, D).T, "bias": lambda x: x.reshape(D)}[part]
    return lambda leaves: np.concatenate([flat(leaves[f"params.{n}.{part}"]) for n in ("query", "key", "value")])


x = np.random.default_rng(0).standard_normal((2, 7, D))
flax_attention = linen.MultiHeadDotProductAttention(HEADS)
params = flax_attention.init(jax.random.key(0), x.astype(np.float32))
names = {"mha.in_proj_weight": joined("kernel"), "mha.in_proj_bias": joined("bias")}
names |= {"mha.out_proj.weight": "params.out.kernel", "mha.out_proj.bias": "params.out.bias"}
attention = Pair(flax_attention, SelfAttention(), inputs=[x], params=params, names=names, name="attention")

if __name__ == "__main__":
    attention.compare().show()
