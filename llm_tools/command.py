"""The programs of this package as one command: `one-model train --framework jax ...`."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from llm_common.errors import UserError, nearest, run_main

PROGRAMS = {
    "train-tokenizer": "train a byte-level BPE tokenizer on your text",
    "prepare-data": "encode text, or questions with answers, for training",
    "inspect-data": "look at what was encoded",
    "train": "train a model in JAX or PyTorch, or go on with a run",
    "plot-runs": "draw the losses of runs",
    "generate": "write text with a run or a Hugging Face folder",
    "evaluate": "the loss of a model on text: perplexity, bits per byte",
    "export": "write a model for transformers, vLLM or llama.cpp",
    "convert-checkpoint": "checkpoints to and from Orbax and torch's DCP",
    "check-tokenizer": "compare a tokenizer's folder with transformers",
    "benchmark": "measure training and decoding beside other libraries",
}


def usage() -> str:
    """The page that `one-model` alone prints."""
    width = max(map(len, PROGRAMS))
    lines = [f"  one-model {name:{width}}  {what}" for name, what in PROGRAMS.items()]
    lines += [
        "",
        "  one-model PROGRAM --help     its flags",
        "  parity run                   do both frameworks agree?",
    ]
    return "\n".join(["One language model, written twice: in JAX and in PyTorch.", "", *lines])


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one program. Raises UserError for a name that none has."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        try:
            print(f"one-model-twice {version('one-model-twice')}")
        except PackageNotFoundError:
            print("one-model-twice, not installed")
        return 0
    name = argv[0].replace("_", "-").removesuffix(".py")
    if name not in PROGRAMS:
        raise UserError(f"one-model {argv[0]}: no such program{nearest(name, PROGRAMS)}; known: {', '.join(PROGRAMS)}")
    return importlib.import_module(f"llm_tools.programs.{name.replace('-', '_')}").main(argv[1:])


def entry() -> None:
    """The console script."""
    run_main(main)
