"""The catalogue of planted bugs: realistic porting errors on either side, in shared code, and in both sides at once."""

from parity.catalogue import attention, blocks, equal, files, generation, loss, optimizer, sampling  # each adds its own
from parity.catalogue.mutant import EQUIVALENTS, MUTANTS, Mutant

__all__ = [
    "EQUIVALENTS",
    "MUTANTS",
    "Mutant",
    "attention",
    "blocks",
    "equal",
    "files",
    "generation",
    "loss",
    "optimizer",
    "sampling",
]
