"""Generate text from a checkpoint, or from a folder with config.json and a float32 model.safetensors, in either framework.

    python scripts/generate.py --framework jax --checkpoint runs/first --prompt "Return a string" --seed 1
    python scripts/generate.py --framework torch --checkpoint runs/first --prompt "Return a string" --seed 1 --texts 3

The same seed draws the same text in both frameworks, unless a draw lies within the margin of rounding. Text i of several
draws with random numbers of its own.
"""

import argparse
from pathlib import Path

import numpy as np
from flags import add_flags, from_flags

from llm_common.checkpoint import latest_checkpoint, load_weights
from llm_common.config import DTYPES, SamplingConfig
from llm_common.errors import UserError, import_side, run_main
from llm_common.hf_tokenizer import load_tokenizer
from llm_common.tokenizer import Tokenizer, check_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", required=True, choices=["jax", "torch"])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--tokenizer", type=Path, help="default: the one saved with the checkpoint")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--texts", type=int, default=1, help="how many continuations")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    parser.add_argument("--compute-dtype", choices=DTYPES, default="float32")
    add_flags(parser, SamplingConfig, "sampling")
    args = parser.parse_args()

    sampling = from_flags(SamplingConfig, args)
    if args.texts < 1:
        raise UserError(f"--texts {args.texts}: must be at least 1")
    side = import_side(args.framework, "generate")
    folder = latest_checkpoint(args.checkpoint) or args.checkpoint
    cfg, weights = load_weights(folder)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: give one with --tokenizer")
    check_vocabulary(tokenizer, cfg.vocab_size)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise UserError("--prompt is empty: give at least one character")
    texts = side.generate_from(
        cfg,
        weights,
        np.array([ids] * args.texts),
        args.max_new_tokens,
        sampling,
        tokenizer.end_of_text,
        args.device,
        args.compute_dtype,
    )
    for i, text in enumerate(texts):
        print(f"--- {i}" if args.texts > 1 else "", end="\n" if args.texts > 1 else "")
        print(args.prompt + tokenizer.decode(text))


if __name__ == "__main__":
    run_main(main)
