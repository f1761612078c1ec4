"""Generate text from a run, a checkpoint or a Hugging Face folder, in either framework or in both.

    one-model generate --framework jax --checkpoint runs/first --prompt "Return a string" --seed 1
    one-model generate --framework torch --checkpoint runs/first --prompt "Return" --prompt "The list" --texts 3
    one-model generate --framework torch --checkpoint my_llama/ --chat --prompt "Who are you?" --temperature 0
    one-model generate --framework both --checkpoint runs/first --prompt "Return a string"

A text is decided by its prompt, its number among the --texts of that prompt, the sampling flags and the seed; prompts
of any lengths may stand beside each other without changing one another's text. The same seed draws the same text in
both frameworks, unless a draw lies within the margin of rounding: --framework both shows the first token where they
part, and its margin. A prompt and --max-new-tokens together must fit the model's positions: what does not is refused,
never cut.

A text ends at any of the ids that the model's configs, its tokenizer and the data of its run end texts with, and at
--stop-token. Special tokens written out in a --prompt are those tokens; within --chat, where the prompt is data, they
are text, unless --special-tokens-in-text. Many prompts are worked on in batches, each printed when it is done.
"""

from collections.abc import Sequence
from pathlib import Path

from llm_common.config import COMPILE, DTYPES, SamplingConfig
from llm_common.errors import UserError, require_framework
from llm_common.run.checkpoint import load_weights
from llm_common.run.folder import newest
from llm_common.run.progress import Heartbeat
from llm_common.sharding import MeshConfig, check_mesh
from llm_common.tensors import check_prompts
from llm_common.text.hf_tokenizer import load_tokenizer, open_tokenizer
from llm_common.text.tokenizer import check_vocabulary
from llm_common.text.words import clean
from llm_tools.flags import (
    add_flags,
    add_mesh_flags,
    add_special_flag,
    at_least_one,
    check_device,
    from_flags,
    join,
    make_parser,
    only_the_first_prints,
    prepare_environment,
)
from llm_tools.frameworks import FRAMEWORKS, open_backend
from llm_tools.texts import (
    MOST_TEXTS,
    all_stops,
    batch_size,
    check_own_tokenizer,
    compare,
    encode,
    read_prompts,
    write_texts,
)

NEW_TOKENS = 100


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("generate", __doc__)
    parser.add_argument("--framework", required=True, choices=["jax", "torch", "both"])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, one checkpoint, or a Hugging Face folder"
    )
    parser.add_argument("--tokenizer", type=Path, help="default: the one saved with the checkpoint")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--prompts-file", type=Path, help="more prompts, one a line")
    parser.add_argument("--batch-size", type=int, help="texts at once (default: what a GiB of cache holds, at most 64)")
    add_special_flag(parser, default=None)
    parser.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, help=f"default: {NEW_TOKENS}, or as many as the model has room for"
    )
    parser.add_argument("--texts", type=int, default=1, help="how many continuations of each prompt")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends a text and is not in it; may be repeated"
    )
    parser.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token, or its id, that ends a text; may be repeated",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end of text")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    add_mesh_flags(parser)
    parser.add_argument("--compute-dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="PyTorch on a GPU: 'auto' captures a step, 'on' compiles it before, which takes one to three minutes "
        "and pays for long texts",
    )
    add_flags(parser, SamplingConfig, "sampling")
    args = parser.parse_args(argv)

    check_device(args.device)
    prepare_environment(None)
    sampling = from_flags(SamplingConfig, args)
    at_least_one(args, "texts", "batch_size", "max_new_tokens")
    if args.texts > MOST_TEXTS:
        raise UserError(f"--texts {args.texts}: at most {MOST_TEXTS:,} of each prompt")
    args.stop = [clean(text) for text in args.stop]
    if "" in args.stop:
        raise UserError("--stop is empty: give at least one character")
    frameworks = [name for name in FRAMEWORKS if args.framework in (name, "both")]
    for name in frameworks:
        require_framework(name)
    prompts = read_prompts(args)
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: give one with --tokenizer")
    check_vocabulary(tokenizer, cfg.vocab_size)
    check_own_tokenizer(args.tokenizer, tokenizer, folder)
    encoded = [encode(tokenizer, prompt, args) for prompt in prompts]
    room = cfg.max_position_embeddings - max(map(len, encoded))
    if args.max_new_tokens is None:
        args.max_new_tokens = max(1, min(NEW_TOKENS, room))
    elif 0 < room < args.max_new_tokens:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens}: beside the longest prompt there is room for {room} at most"
        )
    check_prompts(encoded, cfg, args.max_new_tokens)
    stops = () if args.ignore_eos else all_stops(tokenizer, folder, args)
    rows = [(prompt, ids, n) for prompt, ids in zip(prompts, encoded, strict=True) for n in range(args.texts)]
    most = args.batch_size or batch_size(cfg, max(map(len, encoded)) + args.max_new_tokens, args.compute_dtype)
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if mesh is not None:
        if args.framework == "both":
            raise UserError("--mesh with --framework both: generate with one framework, then with the other")
        check_mesh(mesh, cfg)
    backends = [open_backend(name) for name in frameworks]  # what can be refused without them has been
    hosts = join(backends[0], args, mesh)
    only_the_first_prints(hosts)
    results: dict[str, list[list[int]]] = {}
    for backend in backends:
        name = backend.name
        making = backend.generator(cfg, weights, args.compute_dtype, hosts.device, mesh, args.compile)
        heart = Heartbeat(f"{name}: generating", quiet=hosts.index > 0)
        with heart, making as stream:
            results[name] = []
            while (done := len(results[name])) < len(rows):
                results[name] += write_texts(
                    stream, rows[done : done + most], done, tokenizer, sampling, stops, args, alone=len(rows) == 1
                )
    if args.framework == "both":
        compare(cfg, weights, tokenizer, rows, results, sampling, args)
