"""optax.adamw against torch.optim.AdamW: the same formula, with defaults that differ (decay 1e-4 in optax, 1e-2 in
torch).

python examples/adamw.py
"""

import numpy as np
import optax
import torch

from parity.pair import compare_optimizers
from parity.report.report import make_console, print_table

rng = np.random.default_rng(0)
params = {"weight": rng.standard_normal((8, 16)), "bias": rng.standard_normal(8)}
same = compare_optimizers(
    optax.adamw(1e-3, weight_decay=1e-2), lambda p: torch.optim.AdamW(p, 1e-3), params, steps=(1, 3, 100)
)
defaults = compare_optimizers(optax.adamw(1e-3), lambda p: torch.optim.AdamW(p, 1e-3), params, steps=(1, 3, 100))

if __name__ == "__main__":
    console = make_console()
    console.rule("the same decay", align="left")
    print_table(console, same)
    console.rule("each with its own default", align="left")
    print_table(console, defaults)
