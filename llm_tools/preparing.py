"""What one-model prepare-data needs: training and held-out parts of texts, and pairs of prompts and answers."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from llm_common.data.answers import ExampleReader, read_pairs, write_examples
from llm_common.data.datasets import unigram_entropy, write_tokens
from llm_common.data.sequences import AUTO, DocumentEncoder
from llm_common.data.shards import is_held_out
from llm_common.errors import UserError, counted, notice
from llm_common.text.hf_tokenizer import AnyTokenizer

T = TypeVar("T")


def divide(items: Iterable[T], share: float, text: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """What is kept and what is held out, by the hash of each one's text. Raises UserError if one of them would be
    empty.
    """
    kept, held_out = [], []
    for item in items:
        (held_out if is_held_out(text(item), share) else kept).append(item)
    if not kept or not held_out:
        raise UserError(f"--validation {share} of {len(kept) + len(held_out)} leaves one side empty")
    return kept, held_out


def prepare_examples(args: argparse.Namespace, tokenizer: AnyTokenizer) -> None:
    if not (args.prompt_field and args.answer_field and args.data):
        raise UserError("examples need --prompt-field, --answer-field and --data with a JSONL, JSON or CSV file")
    if len(args.data) > 1:
        raise UserError("--data: examples are read from one file")
    if args.document_end != AUTO:
        raise UserError("--document-end is for documents; what ends an answer is --turn-end")
    pairs = read_pairs(args.data[0], args.prompt_field, args.answer_field)
    sides = {args.out: pairs}
    if args.validation:
        kept, held_out = divide(pairs, args.validation, lambda pair: "\n".join(pair))
        sides = {args.out: kept, args.out.with_name(f"{args.out.stem}-validation.npz"): held_out}
    for path, found in sides.items():
        reader = ExampleReader(tokenizer, args.chat, args.turn_end, args.special_tokens_in_text)
        info = write_examples(path, itertools.starmap(reader, found), reader, args.max_length, args.validation)
        print(
            f"{path}: {counted(info['examples'], 'example')}, {counted(info['tokens'], 'token')}, "
            "the longest "
            f"{info['longest']}; {info['left_out']} left out"
        )
        if reader.shortened:
            notice(
                f"of {reader.shortened:,} answers the chat template left something out, or wrote it otherwise; it is "
                "not learned"
            )
        if reader.endless:
            notice(
                f"after {reader.endless:,} answers no special token comes: a model that learns them does not learn "
                "to stop"
            )


def write(path: Path, texts: Iterable[str], encoder: DocumentEncoder, held_out: float = 0.0) -> None:
    info = write_tokens(path, texts, encoder, held_out)
    entropy = unigram_entropy(np.load(path, mmap_mode="r"))
    print(
        f"{path}: {counted(info['tokens'], 'token')} of {counted(info['documents'], 'document')}, "
        f"{info['bytes'] / info['tokens']:.2f} bytes a token, unigram entropy {entropy:.3f} nats"
    )
    if info["document_ends_inside"]:
        notice(
            f"{info['document_ends_inside']:,} times the token that ends a document stands inside one: one-model train "
            "--document-mask "
            "refuses this file; give another --document-end"
        )
