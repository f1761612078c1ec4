"""The loss of a checkpoint, or of a Hugging Face folder, on any text: nats per token, perplexity, bits per byte.

    python scripts/evaluate.py --framework jax --checkpoint runs/first --data data/tokens-validation.npy
    python scripts/evaluate.py --framework torch --checkpoint my_llama/ --text book.txt --seq-len 512
    python scripts/evaluate.py --framework torch --checkpoint runs/first --text book.txt --json

--data: held-out tokens or examples of prepare_data.py. What decides their loss is what the run was trained with (the
length of a window, the document mask, the dtype, how many batches), unless a flag says otherwise: the loss is the one
in log.jsonl.

--text: every token of a document is predicted once, the first from what the tokenizer puts before a text, in windows of
the model's positions. These are the windows of lm-eval's rolling likelihood, and so are the perplexities. lm-eval
0.4.13 puts a beginning of text (<s>) twice before a text and predicts one of the two, unless it is told
add_bos_token=False; --count-prefix does that too.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from llm_common.config import (
    ATTENTION_BACKENDS,
    DTYPES,
    ExecutionConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    check_length,
)
from llm_common.data.datasets import check_data, open_tokens
from llm_common.data.evaluation import DocumentEvaluation, Evaluation, open_held_out
from llm_common.errors import UserError, is_out_of_memory, run_main
from llm_common.run.checkpoint import load_weights, read_settings
from llm_common.run.folder import newest
from llm_common.sharding import MeshConfig, check_sharded
from llm_common.text.corpus import Corpus
from llm_common.text.hf_tokenizer import AnyTokenizer, load_tokenizer, open_tokenizer
from llm_common.text.tokenizer import check_vocabulary
from llm_tools.flags import (
    add_mesh_flags,
    add_special_flag,
    add_text_flags,
    at_least_one,
    join,
    make_parser,
    only_the_first_prints,
    prepare_environment,
)
from llm_tools.frameworks import open_backend

MOST_TOKENS = 8192  # of a batch, as long as a flag does not say how many texts it has


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--framework", required=True, choices=["jax", "torch"])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, one checkpoint, or a Hugging Face folder"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a file of text, JSONL, JSON or CSV, or a folder with some")
    source.add_argument("--data", type=Path, help="tokens (.npy, shards) or examples (.npz) of prepare_data.py")
    parser.add_argument("--tokenizer", type=Path, help="default: the one saved with the checkpoint")
    parser.add_argument("--seq-len", type=int, help="default: the run's for --data, the model's positions for --text")
    parser.add_argument(
        "--batch-size", type=int, help=f"default: the run's for --data, about {MOST_TOKENS} tokens for --text"
    )
    parser.add_argument(
        "--batches", type=batches, help="only the first so many batches, or 'all' (default: as the run did)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    add_mesh_flags(parser)
    parser.add_argument("--compute-dtype", choices=DTYPES, help="default: the run's, else float32")
    parser.add_argument("--attention-backend", choices=ATTENTION_BACKENDS, default="auto")
    text = parser.add_argument_group("text")
    add_text_flags(text)
    add_special_flag(text, default=False)
    text.add_argument("--count-prefix", action="store_true", help="predict the beginning of text, too, from itself")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    at_least_one(args, "seq_len", "batch_size")
    if isinstance(args.batches, int):
        at_least_one(args, "batches")

    prepare_environment(None)
    backend = open_backend(args.framework)
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    if args.seq_len is not None:
        check_length(cfg, args.seq_len, "--seq-len")
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    saved = read_settings(folder)
    train = Recipe.from_settings(cfg, saved.get("train", {"seq_len": cfg.max_position_embeddings})).train
    if args.compute_dtype is not None:
        train = dataclasses.replace(train, compute_dtype=args.compute_dtype)
    evaluation = open_data(args, cfg, saved, train, tokenizer) if args.data else open_text(args, cfg, tokenizer, folder)
    train = dataclasses.replace(
        train,
        seq_len=evaluation.seq_len,
        batch_size=evaluation.batch_size,
        # a text has one document in each row
        document_separator=train.document_separator if args.data else None,
    )
    recipe = Recipe(cfg, train, execution=ExecutionConfig(attention_backend=args.attention_backend))
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if mesh is not None:
        check_sharded(mesh, recipe)
    hosts = join(backend, args, mesh)
    only_the_first_prints(hosts)
    try:
        with backend.evaluator(recipe, weights, hosts.device, mesh) as evaluate:
            result = evaluation.summary(*evaluate(evaluation))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with {evaluation.batch_size} windows of {evaluation.seq_len} tokens: take a smaller "
            "--batch-size or "
            "--seq-len"
        ) from None
    show(args, folder, train, evaluation, result)


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
        f"{result['tokens']:,} tokens"
    )
    if "bits_per_byte" in result:
        print(f"{result['bits_per_byte']:.6f} bits per byte, {result['bytes']:,} bytes")
    mask = "" if train.document_separator is None else ", no document sees another"
    print(f"windows of at most {evaluation.seq_len} tokens, {train.compute_dtype}{mask}")


if __name__ == "__main__":
    run_main(main)
