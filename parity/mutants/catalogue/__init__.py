"""The catalogue of planted bugs: realistic porting errors on either side, in shared code, and in both sides at once."""

from parity.mutants.catalogue import attention, blocks, documents, equal, files, generation, loss, optimizer, sampling
from parity.mutants.catalogue.mutant import EQUIVALENTS, MUTANTS, Mutant

__all__ = [
    "EQUIVALENTS",
    "MUTANTS",
    "Mutant",
    "attention",
    "blocks",
    "documents",
    "equal",
    "files",
    "generation",
    "loss",
    "optimizer",
    "sampling",
]
