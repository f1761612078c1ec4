"""What one-model evaluate needs: held-out data as a run had it, texts as lm-eval reads them."""

import argparse
import json
from pathlib import Path
from typing import Any

from llm_common.config import (
    ModelConfig,
    TrainConfig,
)
from llm_common.data.datasets import check_data, open_tokens
from llm_common.data.evaluation import DocumentEvaluation, Evaluation, open_held_out
from llm_common.errors import UserError, counted
from llm_common.text.corpus import Corpus
from llm_common.text.hf_tokenizer import AnyTokenizer
from llm_common.text.tokenizer import check_vocabulary

MOST_TOKENS = 8192  # of a batch, as long as a flag does not say how many texts it has


def batches(text: str) -> int | str:
    return text if text == "all" else int(text)


def open_data(
    args: argparse.Namespace,
    cfg: ModelConfig,
    saved: dict[str, Any],
    train: TrainConfig,
    tokenizer: AnyTokenizer | None,
) -> Evaluation:
    """Held-out data, cut as the run did it."""
    check_data(args.data, tokenizer)
    of_run = "train" in saved
    most = saved.get("eval_batches") if args.batches is None else None if args.batches == "all" else args.batches
    lengths = None if tokenizer is None else tokenizer.byte_lengths()
    length = args.seq_len or (train.seq_len if of_run else None)
    return open_held_out(
        args.data, open_tokens, length, args.batch_size or (train.batch_size if of_run else 8), lengths, most, cfg
    )


def open_text(args: argparse.Namespace, cfg: ModelConfig, tokenizer: AnyTokenizer | None, folder: Path) -> Evaluation:
    """A text's documents, as lm-eval would read them."""
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: give one with --tokenizer")
    check_vocabulary(tokenizer, cfg.vocab_size)
    texts = list(Corpus([args.text], args.field, args.replace_invalid, as_text=args.as_text).documents())
    context = tokenizer.context_ids
    first = context if args.count_prefix and tokenizer.prefix_ids else []
    documents = [first + tokenizer.encode(text, args.special_tokens_in_text) for text in texts]
    length = args.seq_len or cfg.max_position_embeddings
    rows = args.batch_size or max(1, MOST_TOKENS // min(length, max(map(len, documents))))
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    most = None if args.batches == "all" else args.batches
    evaluation = DocumentEvaluation(documents, context, length, rows, n_bytes, most)
    evaluation.check(cfg.vocab_size, str(args.text))
    return evaluation


def show(
    args: argparse.Namespace, folder: Path, train: TrainConfig, evaluation: Evaluation, result: dict[str, Any]
) -> None:
    if args.json:
        print(json.dumps({"checkpoint": str(folder), "framework": args.framework, **result}))
        return
    print(
        f"{folder}: loss {result['loss']:.6f} nats per token, perplexity {result['perplexity']:.4f}, "
        f"{counted(result['tokens'], 'token')}"
    )
    if "bits_per_byte" in result:
        print(f"{result['bits_per_byte']:.6f} bits per byte, {result['bytes']:,} bytes")
    mask = "" if train.document_separator is None else ", no document sees another"
    print(f"windows of at most {evaluation.seq_len} tokens, {train.compute_dtype}{mask}")
