"""Encode text to a token file, which training maps into memory.

python scripts/prepare_data.py --tokenizer data/bpe.json --out data/tokens.npy
python scripts/prepare_data.py --tokenizer data/bpe.json --out data/tokens.npy --data my_texts/
"""

import argparse
from pathlib import Path

import numpy as np

from llm_common.corpus import documents
from llm_common.data import unigram_entropy, write_tokens
from llm_common.errors import run_main
from llm_common.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("data/bpe.json"))
    parser.add_argument("--out", type=Path, default=Path("data/tokens.npy"))
    parser.add_argument(
        "--data", type=Path, help="UTF-8 file or folder of .txt and .md (default: Python's documentation)"
    )
    args = parser.parse_args()
    info = write_tokens(args.out, documents(args.data), Tokenizer.load(args.tokenizer))
    entropy = unigram_entropy(np.load(args.out, mmap_mode="r"))
    print(
        f"{args.out}: {info['tokens']:,} tokens of {info['documents']:,} documents, "
        f"{info['bytes'] / info['tokens']:.2f} bytes a token, unigram entropy {entropy:.3f} nats"
    )


if __name__ == "__main__":
    run_main(main)
