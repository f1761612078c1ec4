"""Look at token data before a model does: how long documents are, which tokens are frequent, what samples say.

    one-model inspect-data --data data/tokens.npy --tokenizer data/bpe.json
    one-model inspect-data --data data/web/ --tokenizer data/bpe.json --check --out runs/data.png

Of examples (.npz) it shows prompts and answers apart. --check says that every byte is as it was written; data that is
not is refused anyway. --out draws the lengths of the documents and the frequencies of the tokens; it needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_common.data.datasets import check_data, open_tokens
from llm_common.errors import UserError, require_package
from llm_common.text.hf_tokenizer import open_tokenizer
from llm_tools.data_report import draw, inspect_examples, read, report
from llm_tools.flags import at_least_one, make_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("inspect-data", __doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("data/tokens.npy"), help="a .npy or .npz file or a folder of shards"
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("data/bpe.json"), help="bpe.json or a folder")
    parser.add_argument("--samples", type=int, default=3, help="pieces of text that are shown")
    parser.add_argument("--sample-length", type=int, default=60, help="tokens of each")
    parser.add_argument("--top", type=int, default=20, help="most frequent tokens that are shown")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' places")
    parser.add_argument("--check", action="store_true", help="compare every shard's sha256")
    parser.add_argument("--out", type=Path, metavar="PNG", help="of a picture")
    args = parser.parse_args(argv)
    at_least_one(args, "samples", "sample_length", "top")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: at least 0")
    if args.out is not None:
        require_package("matplotlib", "parity")
        if args.out.suffix not in (".png", ".pdf", ".svg", ".jpg"):
            raise UserError(f"--out {args.out}: a picture ends in .png, .pdf, .svg or .jpg")
    console, tokenizer = Console(), open_tokenizer(args.tokenizer)
    description = check_data(args.data, tokenizer)
    if args.check:
        shards = description.get("shards")
        what = f"{len(shards)} shards are" if shards is not None else f"{args.data} is"
        console.print(f"{what} as {'the manifest' if shards is not None else 'its description'} says", markup=False)
    if args.data.suffix == ".npz":
        inspect_examples(console, args, tokenizer)
        return
    tokens = open_tokens(args.data)
    if not len(tokens):
        raise UserError(f"{args.data}: no tokens")
    end = description.get("document_end")
    counts, lengths = read(tokens, end)
    if len(counts) > tokenizer.vocab_size:
        raise UserError(
            f"{args.data}: id {len(counts) - 1} is not in the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    report(console, tokens, tokenizer, counts, lengths, args.top)
    rng = np.random.default_rng(args.seed)
    places = max(1, len(tokens) - args.sample_length)
    for start in sorted(rng.integers(0, places, min(args.samples, places)).tolist()):
        text = tokenizer.decode(tokens[start : start + args.sample_length].tolist())
        console.rule(f"tokens {start:,} to {start + args.sample_length:,}", align="left")
        console.print(text, markup=False, highlight=False)
    if args.out is not None:
        draw(args.out, counts, lengths)
        console.print(f"{args.out}: lengths of documents, frequencies of tokens", markup=False)
