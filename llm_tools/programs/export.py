"""Write a checkpoint as a folder that transformers, vLLM and others load without this program.

    one-model export --checkpoint runs/first --out my_model/
    one-model export --checkpoint runs/first --out my_model/ --dtype bfloat16
    one-model export --checkpoint runs/first --out my_model.gguf --dtype q8_0

The folder holds config.json, model.safetensors (in shards, if it is large) and the tokenizer with its chat template.
A name that ends in .gguf is one file for llama.cpp: float32, float16, bfloat16 or q8_0; it needs the package gguf.
"""

from collections.abc import Sequence
from pathlib import Path

from llm_common.errors import UserError, require_package
from llm_common.files.export import DTYPES, export
from llm_common.files.gguf_export import TYPES, export_gguf
from llm_common.run.checkpoint import load_weights, stops_of
from llm_common.run.folder import newest
from llm_common.run.progress import Heartbeat
from llm_common.text.hf_tokenizer import load_tokenizer
from llm_tools.flags import make_parser

FILES = (".bin", ".h5", ".json", ".npz", ".onnx", ".pt", ".pth", ".safetensors")  # what an export is not


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("export", __doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or a new .gguf file")
    kinds = tuple(dict.fromkeys((*DTYPES, *TYPES)))
    parser.add_argument("--dtype", choices=kinds, default="float32", help="q8_0: in a .gguf file alone")
    parser.add_argument("--shard-gib", type=float, help="the most that one file holds (default: 5)")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out}: is there already; nothing is overwritten")
    if args.shard_gib is not None and not 0 < args.shard_gib < float("inf"):
        raise UserError(f"--shard-gib {args.shard_gib}: must be positive")
    as_gguf = args.out.suffix.lower() == ".gguf"
    if args.out.name.lower() == ".gguf" or (args.out.suffix.lower() in FILES and not as_gguf):
        raise UserError(f"--out {args.out}: a folder is written; or one file, whose name ends in .gguf")
    if as_gguf and args.shard_gib is not None:
        raise UserError("--shard-gib: a GGUF file is one file; leave the flag out")
    if as_gguf:
        require_package("gguf", "gguf")
    elif args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype}: is for GGUF; give --out a name that ends in .gguf")
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    tokenizer, stops = load_tokenizer(folder), stops_of(folder)
    with Heartbeat(f"writing {args.out}"):
        if as_gguf:
            size = export_gguf(args.out, cfg, weights, tokenizer, args.dtype, stops)
            written = f"{size / 1e6:,.1f} MB, {args.dtype}" + ("" if tokenizer else "; no tokenizer is in it")
        else:
            names = export(args.out, cfg, weights, tokenizer, args.dtype, int((args.shard_gib or 5.0) * 2**30), stops)
            written = ", ".join(names)
    print(f"{args.out}: {written}")
