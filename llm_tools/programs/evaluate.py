"""The loss of a checkpoint, or of a Hugging Face folder, on any text: nats per token, perplexity, bits per byte.

    one-model evaluate --framework jax --checkpoint runs/first --data data/tokens-validation.npy
    one-model evaluate --framework torch --checkpoint my_llama/ --text book.txt --seq-len 512
    one-model evaluate --framework torch --checkpoint runs/first --text book.txt --json

--data: held-out tokens or examples of prepare-data. What decides their loss is what the run was trained with (the
length of a window, the document mask, the dtype, how many batches), unless a flag says otherwise: the loss is the one
in log.jsonl.

--text: every token of a document is predicted once, the first from what the tokenizer puts before a text, in windows of
the model's positions. These are the windows of lm-eval's rolling likelihood, and so are the perplexities. lm-eval
0.4.13 puts a beginning of text (<s>) twice before a text and predicts one of the two, unless it is told
add_bos_token=False; --count-prefix does that too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llm_common.config import (
    ATTENTION_BACKENDS,
    DTYPES,
    ExecutionConfig,
    Recipe,
    check_length,
)
from llm_common.errors import UserError, is_out_of_memory, require_framework
from llm_common.run.checkpoint import load_weights, read_settings
from llm_common.run.folder import newest
from llm_common.run.progress import Heartbeat
from llm_common.sharding import MeshConfig, check_sharded
from llm_common.text.hf_tokenizer import load_tokenizer, open_tokenizer
from llm_tools.evaluating import MOST_TOKENS, batches, open_data, open_text, show
from llm_tools.flags import (
    add_mesh_flags,
    add_special_flag,
    add_text_flags,
    at_least_one,
    check_device,
    join,
    make_parser,
    only_the_first_prints,
    prepare_environment,
)
from llm_tools.frameworks import open_backend
from llm_tools.texts import check_own_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("evaluate", __doc__)
    parser.add_argument("--framework", required=True, choices=["jax", "torch"])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, one checkpoint, or a Hugging Face folder"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a file of text, JSONL, JSON or CSV, or a folder with some")
    source.add_argument("--data", type=Path, help="tokens (.npy, shards) or examples (.npz) of prepare-data")
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
    args = parser.parse_args(argv)
    at_least_one(args, "seq_len", "batch_size")
    if args.data is not None and (args.field != "text" or args.count_prefix or args.as_text or args.replace_invalid):
        raise UserError("--field, --as-text, --replace-invalid and --count-prefix are for --text, not for --data")
    if isinstance(args.batches, int):
        at_least_one(args, "batches")

    require_framework(args.framework)
    check_device(args.device)
    prepare_environment(None)
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    if args.seq_len is not None:
        check_length(cfg, args.seq_len, "--seq-len")
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    if tokenizer is not None:
        check_own_tokenizer(args.tokenizer, tokenizer, folder)
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
    backend = open_backend(args.framework)  # what can be refused without it has been
    hosts = join(backend, args, mesh)
    only_the_first_prints(hosts)
    try:
        heart = Heartbeat(f"evaluating {evaluation.n_targets:,} tokens", quiet=hosts.index > 0)
        with heart, backend.evaluator(recipe, weights, hosts.device, mesh) as evaluate:
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
