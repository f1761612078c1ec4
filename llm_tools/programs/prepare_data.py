"""Encode text to a token file, or questions with answers to a file of examples; training reads either.

    one-model prepare-data --tokenizer data/bpe.json --out data/tokens.npy
    one-model prepare-data --tokenizer data/bpe.json --out data/tokens.npy --data my_texts/ --validation 0.05
    one-model prepare-data --tokenizer data/bpe.json --out data/web/ --data web/*.jsonl.gz --field content
    one-model prepare-data --tokenizer my_llama/ --out data/questions.npz --data questions.jsonl \\
        --prompt-field question --answer-field answer --chat --max-length 512

Data: UTF-8 text in which <|endoftext|> separates documents; JSONL, JSON or CSV, whose --field is the text; any of
them also as .gz; a folder stands for all such files in it. --out FILE.npy writes one file. --out FOLDER/ writes shards
with a manifest, on all cores; after a kill the same command goes on where it stopped.

A document becomes the tokens that the tokenizer puts before a text (<s>, <|begin_of_text|>, or none), its own, and the
token that ends a document. An answer ends with the token that ends a turn, which chat models have apart from it; both
are found in the tokenizer's files, or given. Special tokens written out in the text are text, unless
--special-tokens-in-text.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llm_common.data.sequences import AUTO, DocumentEncoder
from llm_common.data.shards import PART, prepare
from llm_common.errors import UserError, counted
from llm_common.run.progress import reading_bar
from llm_common.text.hf_tokenizer import open_tokenizer
from llm_tools.flags import (
    add_corpus_flags,
    add_special_flag,
    at_least_one,
    check_processes,
    cores,
    make_parser,
    open_corpus,
)
from llm_tools.preparing import divide, prepare_examples, write


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("prepare-data", __doc__)
    parser.add_argument("--tokenizer", type=Path, default=Path("data/bpe.json"), help="bpe.json or a folder")
    parser.add_argument(
        "--out", type=Path, default=Path("data/tokens.npy"), help=".npy, .npz for examples, or a folder"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="files and folders (default: Python's documentation)"
    )
    add_corpus_flags(parser, "encode shards")
    parser.add_argument("--part-size", type=int, help=f"characters of text for each shard (default: {PART:,})")
    parser.add_argument(
        "--validation", type=float, default=0.0, help="share of the documents to hold out, by their hash"
    )
    parser.add_argument(
        "--document-end",
        default=AUTO,
        metavar="TOKEN",
        help="what ends a document: a token, its id, none (default: auto)",
    )
    add_special_flag(parser, default=False)
    examples = parser.add_argument_group("examples for fine-tuning, out of a JSONL, JSON or CSV file")
    examples.add_argument("--prompt-field", help="the field with the prompt, which is not learned")
    examples.add_argument("--answer-field", help="the field with the answer, which is")
    examples.add_argument("--chat", action="store_true", help="in the tokenizer's chat template")
    examples.add_argument(
        "--turn-end", default=AUTO, metavar="TOKEN", help="what ends an answer: a token, its id, none (default: auto)"
    )
    examples.add_argument("--max-length", type=int, help="leave out examples of more tokens")
    args = parser.parse_args(argv)
    if not 0 <= args.validation < 1:
        raise UserError(f"--validation {args.validation}: must lie in [0, 1)")
    if args.max_length is not None and args.max_length < 2:
        raise UserError(f"--max-length {args.max_length}: must be at least 2")
    tokenizer = open_tokenizer(args.tokenizer)
    if args.prompt_field or args.answer_field:
        prepare_examples(args, tokenizer)
        return
    for name in ("chat", "max_length", "turn_end"):
        if getattr(args, name) not in (None, False, AUTO):
            raise UserError(f"--{name.replace('_', '-')} is for examples: give --prompt-field and --answer-field")
    if args.out.suffix == ".npz":
        raise UserError(
            f"--out {args.out}: .npz is for examples: give --prompt-field and --answer-field, or end it in .npy"
        )
    at_least_one(args, "processes", "part_size")
    check_processes(args.processes)
    encoder = DocumentEncoder(tokenizer, args.document_end, args.special_tokens_in_text)
    with reading_bar(Console()) as show:
        corpus = open_corpus(args.data, args, show, "encoding")
        if not re.fullmatch(r"\.[A-Za-z]+", args.out.suffix):  # web-v1.0/ is a folder
            processes = args.processes or cores()
            manifests = prepare(
                corpus.documents(),
                args.out,
                args.tokenizer,
                args.validation,
                processes,
                args.part_size or PART,
                args.document_end,
                args.special_tokens_in_text,
            )
        elif args.processes is not None or args.part_size is not None:
            flag = "--processes" if args.processes is not None else "--part-size"
            raise UserError(f"{flag}: is for shards: give --out a folder; one file is written by one process")
        elif args.validation == 0:
            write(args.out, corpus.documents(), encoder)
            return
        else:
            kept, held_out = divide(corpus.documents(), args.validation, lambda document: document)
            write(args.out, kept, encoder, args.validation)
            write(args.out.with_name(f"{args.out.stem}-validation.npy"), held_out, encoder, args.validation)
            return
    for side, m in manifests.items():
        print(
            f"{args.out / side}: {counted(m['tokens'], 'token')} of {counted(m['documents'], 'document')} in "
            f"{counted(len(m['shards']), 'shard')}, "
            f"{m['bytes'] / m['tokens']:.2f} bytes a token"
        )
