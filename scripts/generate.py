"""Generate text from a run, a checkpoint or a Hugging Face folder, in either framework or in both.

    python scripts/generate.py --framework jax --checkpoint runs/first --prompt "Return a string" --seed 1
    python scripts/generate.py --framework torch --checkpoint runs/first --prompt "Return" --prompt "The list" --texts 3
    python scripts/generate.py --framework torch --checkpoint my_llama/ --chat --prompt "Who are you?" --temperature 0
    python scripts/generate.py --framework both --checkpoint runs/first --prompt "Return a string"

A text is decided by its prompt, its number among the --texts of that prompt, the sampling flags and the seed; prompts
of any lengths may stand beside each other without changing one another's text. The same seed draws the same text in
both frameworks, unless a draw lies within the margin of rounding: --framework both shows the first token where they
part, and its margin. A prompt and --max-new-tokens together must fit the model's positions: what does not is refused,
never cut.

A text ends at any of the ids that the model's configs, its tokenizer and the data of its run end texts with, and at
--stop-token. Special tokens written out in a --prompt are those tokens; within --chat, where the prompt is data, they
are text, unless --special-tokens-in-text. Many prompts are worked on in batches, each printed when it is done.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import COMPILE, DTYPES, ModelConfig, SamplingConfig
from llm_common.data.sequences import encode_conversation, resolve_token
from llm_common.errors import UserError, is_out_of_memory, run_main
from llm_common.run.checkpoint import load_weights, stops_of
from llm_common.run.estimates import GIB, decode_bytes
from llm_common.run.folder import newest
from llm_common.sharding import MeshConfig, check_mesh
from llm_common.tensors import check_prompts
from llm_common.text.hf_tokenizer import AnyTokenizer, load_tokenizer, open_tokenizer
from llm_common.text.text_stream import TextStream
from llm_common.text.tokenizer import check_vocabulary
from llm_common.text.words import clean
from llm_tools.flags import (
    add_flags,
    add_mesh_flags,
    add_special_flag,
    at_least_one,
    from_flags,
    join,
    make_parser,
    only_the_first_prints,
    prepare_environment,
)
from llm_tools.frameworks import FRAMEWORKS, open_backend

MOST_TEXTS = 100_000


def main() -> None:
    parser = make_parser(__doc__)
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
    parser.add_argument("--max-new-tokens", type=int, default=100)
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
    args = parser.parse_args()

    prepare_environment(None)
    sampling = from_flags(SamplingConfig, args)
    at_least_one(args, "texts", "batch_size", "max_new_tokens")
    if args.texts > MOST_TEXTS:
        raise UserError(f"--texts {args.texts}: at most {MOST_TEXTS:,} of each prompt")
    args.stop = [clean(text) for text in args.stop]
    if "" in args.stop:
        raise UserError("--stop is empty: give at least one character")
    backends = [open_backend(name) for name in FRAMEWORKS if args.framework in (name, "both")]
    folder = newest(args.checkpoint)
    cfg, weights = load_weights(folder)
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: give one with --tokenizer")
    check_vocabulary(tokenizer, cfg.vocab_size)
    prompts = read_prompts(args)
    encoded = [encode(tokenizer, prompt, args) for prompt in prompts]
    check_prompts(encoded, cfg, args.max_new_tokens)
    stops = () if args.ignore_eos else all_stops(tokenizer, folder, args)
    rows = [(prompt, ids, n) for prompt, ids in zip(prompts, encoded, strict=True) for n in range(args.texts)]
    most = args.batch_size or batch_size(cfg, max(map(len, encoded)) + args.max_new_tokens, args.compute_dtype)
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if mesh is not None:
        if args.framework == "both":
            raise UserError("--mesh with --framework both: generate with one framework, then with the other")
        check_mesh(mesh, cfg)
    hosts = join(backends[0], args, mesh)
    only_the_first_prints(hosts)
    results: dict[str, list[list[int]]] = {}
    for backend in backends:
        name = backend.name
        with backend.generator(cfg, weights, args.compute_dtype, hosts.device, mesh, args.compile) as stream:
            results[name] = []
            while (done := len(results[name])) < len(rows):
                results[name] += write_texts(
                    stream, rows[done : done + most], done, tokenizer, sampling, stops, args, alone=len(rows) == 1
                )
    if args.framework == "both":
        compare(cfg, weights, tokenizer, rows, results, sampling, args)


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            raise UserError(f"--prompts-file {args.prompts_file}: no such file")
        try:
            text = args.prompts_file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.prompts_file}: not UTF-8 at byte {error.start}") from None
        # a newline ends a prompt, and nothing else does: a prompt may hold other separators
        prompts += [line for line in text.replace("\r\n", "\n").split("\n") if line]
    if not prompts:
        raise UserError("no prompt: give --prompt or --prompts-file")
    return [clean(prompt) for prompt in prompts]


def encode(tokenizer: AnyTokenizer, prompt: str, args: argparse.Namespace) -> list[int]:
    if args.chat:
        render = lambda text: (tokenizer.chat([{"role": "user", "content": text}], add_generation_prompt=True), 0)
        head, tail = encode_conversation(tokenizer, render, [prompt], bool(args.special_tokens_in_text))
        return head + tail
    ids = tokenizer.encode_prompt(prompt, args.special_tokens_in_text is not False)
    if not ids:
        raise UserError("--prompt is empty: give at least one character")
    return ids


def all_stops(tokenizer: AnyTokenizer, folder: Path, args: argparse.Namespace) -> tuple[int, ...]:
    """Every id that ends a text: the tokenizer's, the configs', those of the run's data, a turn's in a chat, and those
    given.
    """
    given = [resolve_token(tokenizer, token, "--stop-token") for token in args.stop_token]
    turn = [tokenizer.turn_end] if args.chat else []
    found = [*tokenizer.eos_ids, *stops_of(folder), *turn, *given]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def batch_size(cfg: ModelConfig, positions: int, compute_dtype: str) -> int:
    """How many texts of so many positions are worked on at once, so that their cache stays below a GiB."""
    one = decode_bytes(cfg, 1, positions, compute_dtype) - decode_bytes(cfg, 0, positions, compute_dtype)
    return max(1, min(64, int(GIB // one)))


def write_texts(
    stream, rows, first: int, tokenizer, sampling, stops, args: argparse.Namespace, alone: bool
) -> list[list[int]]:
    """Print a batch of texts, a single one as it grows, and return their ids. first: the number of the first one."""
    texts = [TextStream(tokenizer, args.stop, prompt_ids) for _, prompt_ids, _ in rows]
    ids: list[list[int]] = [[] for _ in rows]
    show = args.framework != "both"
    live = show and alone

    def finished(row: int, so_far: list[int]) -> bool:
        out = texts[row].feed(so_far[-1:])
        if live:
            print(out, end="", flush=True)
        return texts[row].stopped

    if live:
        print(rows[0][0] if not args.chat else "", end="", flush=True)
    pieces = stream(
        [prompt_ids for _, prompt_ids, _ in rows],
        args.max_new_tokens,
        sampling,
        stops,
        [number for _, _, number in rows],
        finished,
        chunk=1 if live and sys.stdout.isatty() and args.mesh is None else 16,
    )
    try:
        for new in pieces:
            for row, more in enumerate(new):
                ids[row] += more
    except UserError:
        if live:
            print()  # what was drawn stays on its own line
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with {len(rows)} texts at once, after {first} texts: take --batch-size "
            f"{max(1, len(rows) // 4)}, "
            "or fewer --max-new-tokens"
        ) from None
    for row, (prompt, _, number) in enumerate(rows):
        rest = texts[row].feed([], last=True)
        if live:
            print(rest)
        elif show:
            print(f"--- prompt {(first + row) // args.texts}, text {number}")
            print((prompt if not args.chat else "") + texts[row].text, flush=True)
    return ids


def compare(
    cfg: ModelConfig, weights, tokenizer, rows, results: dict[str, list[list[int]]], sampling: SamplingConfig, args: Any
) -> None:
    """Each text of both frameworks, and where they part: the two tokens, and what margin the draw had."""
    from parity.checks.tokens import allowed_margin, draw_margin
    from parity.sides.jax_side import JaxSide
    from parity.sides.torch_side import TorchSide

    for row, (prompt, prompt_ids, number) in enumerate(rows):
        jax, torch = (results[name][row] for name in ("jax", "torch"))
        print(f"--- prompt {row // args.texts}, text {number}")
        text = TextStream(tokenizer, args.stop, prompt_ids)
        text.feed(jax, last=True)
        print((prompt if not args.chat else "") + text.text)
        at = next((i for i, (a, b) in enumerate(zip(jax, torch, strict=False)) if a != b), min(len(jax), len(torch)))
        if jax == torch:
            print(f"[the same {len(jax)} tokens in both frameworks]")
            continue
        prefix = np.array([prompt_ids + jax[:at]])
        exact = TorchSide(cfg, "float64").logits(weights, prefix)[0, -1]
        sides = (side(cfg, args.compute_dtype, args.device, "auto") for side in (JaxSide, TorchSide))
        error = max(float(np.abs(side.logits(weights, prefix)[0, -1] - exact).max()) for side in sides)
        margin = draw_margin(exact, sampling, number, prefix.shape[1])
        allowed = allowed_margin(error, exact, sampling)
        names = [repr(tokenizer.decode(ids[at : at + 1])) if at < len(ids) else "the end" for ids in (jax, torch)]
        verdict = "rounding" if margin < allowed else "NOT explained"
        print(
            f"[they part at new token {at}, position {prefix.shape[1]}: JAX {names[0]}, PyTorch {names[1]}; "
            f"margin of the draw {margin:.1e}, rounding explains up to {allowed:.1e}: {verdict}]"
        )
        text = TextStream(tokenizer, args.stop, prompt_ids)
        text.feed(torch, last=True)
        print(f"PyTorch: {(prompt if not args.chat else '') + text.text}")


if __name__ == "__main__":
    run_main(main)
