"""Train a byte-level BPE tokenizer.

python scripts/train_tokenizer.py --out data/bpe.json
python scripts/train_tokenizer.py --out data/bpe.json --vocab-size 8192 --data my_texts/
"""

import argparse
from pathlib import Path

from llm_common.bpe_trainer import train_bpe
from llm_common.corpus import documents
from llm_common.errors import run_main
from llm_common.words import PATTERNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/bpe.json"))
    parser.add_argument(
        "--data", type=Path, help="UTF-8 file or folder of .txt and .md (default: Python's documentation)"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="256 bytes + merges + 1 special token")
    parser.add_argument("--pattern", choices=list(PATTERNS), default="gpt2", help="how text is cut into words")
    args = parser.parse_args()
    texts = list(documents(args.data))
    tokenizer = train_bpe(texts, args.vocab_size, pattern=args.pattern)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(args.out)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(
        f"{args.out}: {len(tokenizer.merges)} merges, {tokenizer.vocab_size} ids, from {n_bytes / 1e6:.1f} MB of text"
    )


if __name__ == "__main__":
    run_main(main)
