"""Encode text to a token file, or questions with answers to a file of examples; training reads either.

python scripts/prepare_data.py --tokenizer data/bpe.json --out data/tokens.npy
python scripts/prepare_data.py --tokenizer data/bpe.json --out data/tokens.npy --data my_texts/ --validation 0.05
python scripts/prepare_data.py --tokenizer data/bpe.json --out data/web/ --data web/*.jsonl.gz --field content --validation 0.001
python scripts/prepare_data.py --tokenizer my_llama/ --out data/questions.npz --data questions.jsonl \\
    --prompt-field question --answer-field answer --chat --max-length 512

Data: UTF-8 text in which <|endoftext|> separates documents, or JSONL, either of them also as .gz; a folder stands for its .txt,
.md and .jsonl files. --out FILE.npy writes one file. --out FOLDER/ writes shards with a manifest, on all cores; after a kill the
same command goes on where it stopped.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flags import add_corpus_flags, at_least_one, cores, make_parser, open_corpus
from rich.console import Console

from llm_common.data import unigram_entropy, write_tokens
from llm_common.errors import UserError, run_main
from llm_common.examples import read_examples, write_examples
from llm_common.hf_tokenizer import AnyTokenizer, open_tokenizer
from llm_common.progress import reading_bar
from llm_common.shards import PART, is_held_out, prepare


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, default=Path("data/bpe.json"), help="bpe.json or a folder")
    parser.add_argument(
        "--out", type=Path, default=Path("data/tokens.npy"), help=".npy, .npz for examples, or a folder"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="files and folders (default: Python's documentation)"
    )
    add_corpus_flags(parser, "encode shards")
    parser.add_argument("--part-size", type=int, default=PART, help="characters of text for each shard")
    parser.add_argument(
        "--validation", type=float, default=0.0, help="share of the documents to hold out, by their hash"
    )
    examples = parser.add_argument_group("examples for fine-tuning, out of a JSONL file")
    examples.add_argument("--prompt-field", help="the field with the prompt, which is not learned")
    examples.add_argument("--answer-field", help="the field with the answer, which is")
    examples.add_argument("--chat", action="store_true", help="in the tokenizer's chat template")
    examples.add_argument("--max-length", type=int, help="leave out examples of more tokens")
    args = parser.parse_args()
    if not 0 <= args.validation < 1:
        raise UserError(f"--validation {args.validation}: must lie in [0, 1)")
    if args.max_length is not None and args.max_length < 2:
        raise UserError(f"--max-length {args.max_length}: must be at least 2")
    tokenizer = open_tokenizer(args.tokenizer)
    if args.prompt_field or args.answer_field:
        if not (args.prompt_field and args.answer_field and args.data):
            raise UserError("examples need --prompt-field, --answer-field and --data with a JSONL file")
        if len(args.data) > 1:
            raise UserError("--data: examples are read from one JSONL file")
        found = read_examples(args.data[0], args.prompt_field, args.answer_field, tokenizer, args.chat)
        info = write_examples(args.out, found, tokenizer, args.max_length)
        print(
            f"{args.out}: {info['examples']:,} examples, {info['tokens']:,} tokens, the longest {info['longest']}; "
            f"{info['left_out']} left out"
        )
        return
    at_least_one(args, "processes", "part_size")
    with reading_bar(Console()) as show:
        corpus = open_corpus(args.data, args, show, "encoding")
        if not args.out.suffix:
            processes = args.processes or cores()
            manifests = prepare(
                corpus.documents(), args.out, args.tokenizer, args.validation, processes, args.part_size
            )
        elif args.validation == 0:
            write(args.out, corpus.documents(), tokenizer)
            return
        else:
            kept, held_out = [], []
            for document in corpus.documents():
                (held_out if is_held_out(document, args.validation) else kept).append(document)
            if not kept or not held_out:
                raise UserError(
                    f"--validation {args.validation} of {len(kept) + len(held_out)} documents leaves one side empty"
                )
            write(args.out, kept, tokenizer)
            write(args.out.with_name(f"{args.out.stem}-validation.npy"), held_out, tokenizer)
            return
    for side, m in manifests.items():
        print(
            f"{args.out / side}: {m['tokens']:,} tokens of {m['documents']:,} documents in {len(m['shards'])} shards, "
            f"{m['bytes'] / m['tokens']:.2f} bytes a token"
        )


def write(path: Path, texts: Iterable[str], tokenizer: AnyTokenizer) -> None:
    info = write_tokens(path, texts, tokenizer)
    entropy = unigram_entropy(np.load(path, mmap_mode="r"))
    print(
        f"{path}: {info['tokens']:,} tokens of {info['documents']:,} documents, "
        f"{info['bytes'] / info['tokens']:.2f} bytes a token, unigram entropy {entropy:.3f} nats"
    )


if __name__ == "__main__":
    run_main(main)
