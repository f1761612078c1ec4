"""Anybody's Flax function and torch module, side by side: `Pair`, `compare_optimizers`, and `assert_same` for tests."""

from parity.pair.optimizer_pair import compare_optimizers
from parity.pair.pair import Comparison, Pair
from parity.pair.testing import assert_same

__all__ = ["Comparison", "Pair", "assert_same", "compare_optimizers"]
