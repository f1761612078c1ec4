"""The loss of a checkpoint, or of a Hugging Face folder, on any text: nats per token, perplexity, bits per byte.

    python scripts/evaluate.py --framework jax --checkpoint runs/first --data data/tokens-validation.npy
    python scripts/evaluate.py --framework torch --checkpoint my_llama/ --text book.txt --seq-len 512
    python scripts/evaluate.py --framework torch --checkpoint runs/first --text book.txt --json

The tokens are cut into windows of --seq-len, one after the other; every token of a text is predicted once, the first of each
document from the end-of-text token before it.
"""

import json
from pathlib import Path

import numpy as np
from flags import add_mesh_flags, join, make_parser, only_the_first_prints, prepare_environment

from llm_common.checkpoint import load_weights
from llm_common.config import ATTENTION_BACKENDS, DTYPES, TrainConfig, check_length
from llm_common.corpus import documents
from llm_common.data import TokenDataset, check_tokenizer
from llm_common.errors import UserError, import_side, run_main
from llm_common.evaluation import Evaluation
from llm_common.hf_tokenizer import AnyTokenizer, load_tokenizer, open_tokenizer
from llm_common.run import newest
from llm_common.sharding import MeshConfig, check_sharded
from llm_common.tokenizer import check_vocabulary


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--framework", required=True, choices=["jax", "torch"])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, one checkpoint, or a Hugging Face folder"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a UTF-8 file, or a folder with .txt and .md")
    source.add_argument("--data", type=Path, help="a token file of prepare_data.py")
    parser.add_argument("--tokenizer", type=Path, help="default: the one saved with the checkpoint")
    parser.add_argument("--seq-len", type=int, help="default: the model's positions, at most 1024")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, help="evaluate only the first so many batches")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    add_mesh_flags(parser)
    parser.add_argument("--compute-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention-backend", choices=ATTENTION_BACKENDS, default="auto")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()

    prepare_environment(None)
    side = import_side(args.framework, "evaluate")
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    if tokenizer is None and args.text:
        raise UserError(f"{folder} has no tokenizer: give one with --tokenizer")
    seq_len = args.seq_len or min(1024, cfg.max_position_embeddings)
    train = TrainConfig(
        seq_len=seq_len,
        batch_size=args.batch_size,
        compute_dtype=args.compute_dtype,
        attention_backend=args.attention_backend,
    )
    check_length(cfg, seq_len, "--seq-len")
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if mesh is not None:
        check_sharded(mesh, cfg, train)
    if args.batches is not None and args.batches < 1:
        raise UserError(f"--batches {args.batches}: must be at least 1")
    if args.data:
        if tokenizer is not None:
            check_tokenizer(args.data, tokenizer)
        tokens = TokenDataset(args.data, 1, 1, 0).tokens
    else:
        assert tokenizer is not None
        check_vocabulary(tokenizer, cfg.vocab_size)
        tokens = text_tokens(args.text, tokenizer)
    lengths = None if tokenizer is None else tokenizer.byte_lengths()
    evaluation = Evaluation(tokens, seq_len, args.batch_size, lengths, args.batches)
    evaluation.check(cfg.vocab_size, str(args.data or args.text))
    hosts = join(args.framework, args, mesh)
    only_the_first_prints(hosts)
    if mesh is None:
        opened = side.evaluator(cfg, weights, train, hosts.device)
    else:
        opened = import_side(args.framework, "distributed").evaluator(cfg, weights, train, mesh, hosts.device)
    with opened as evaluate:
        result = evaluation.summary(*evaluate(evaluation))
    if args.json:
        print(json.dumps({"checkpoint": str(folder), "framework": args.framework, **result}))
        return
    print(
        f"{folder}: loss {result['loss']:.6f} nats per token, perplexity {result['perplexity']:.4f}, {result['tokens']:,} tokens"
    )
    if "bits_per_byte" in result:
        print(f"{result['bits_per_byte']:.6f} bits per byte, {result['bytes']:,} bytes")


def text_tokens(path: Path, tokenizer: AnyTokenizer) -> np.ndarray:
    """The ids of some documents, with an end of text, if the tokenizer has one, before each."""
    separator = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids: list[int] = []
    for document in documents(path):
        ids += separator + tokenizer.encode(document)
    return np.array(ids, np.int32)


if __name__ == "__main__":
    run_main(main)
