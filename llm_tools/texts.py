"""What one-model generate needs: prompts, stop ids, and texts as they come."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, SamplingConfig
from llm_common.data.sequences import encode_conversation, resolve_token
from llm_common.errors import UserError, counted, is_out_of_memory
from llm_common.run.checkpoint import stops_of
from llm_common.run.estimates import GIB, decode_bytes
from llm_common.text.hf_tokenizer import AnyTokenizer, load_tokenizer
from llm_common.text.text_stream import TextStream
from llm_common.text.words import clean

MOST_TEXTS = 100_000


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            what = "a folder; a file is needed" if args.prompts_file.is_dir() else "no such file"
            raise UserError(f"--prompts-file {args.prompts_file}: {what}")
        try:
            text = args.prompts_file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.prompts_file}: not UTF-8 at byte {error.start}") from None
        # a newline ends a prompt, and nothing else does: a prompt may hold other separators
        prompts += [line for line in text.replace("\r\n", "\n").split("\n") if line]
    if not prompts and args.prompts_file is not None:
        raise UserError(f"--prompts-file {args.prompts_file}: has no line with a prompt")
    if not prompts:
        raise UserError("no prompt: give --prompt or --prompts-file")
    return [clean(prompt) for prompt in prompts]


PROBE = "The cat's 123 dogs, I'LL  see\n\n\tЕлка 日本語 🙂 <|endoftext|> def f(x): return x"


def check_own_tokenizer(given: Path | None, tokenizer: AnyTokenizer, folder: Path) -> None:
    """Raise UserError for a tokenizer with other ids than the one that is saved with a checkpoint: its numbers would
    mean nothing.
    """
    own = None if given is None else load_tokenizer(folder)
    if own is not None and own.encode(PROBE) != tokenizer.encode(PROBE):
        raise UserError(f"--tokenizer {given}: has other ids than the tokenizer of {folder}; leave the flag out")


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
            print(f"[the same {counted(len(jax), 'token')} in both frameworks]")
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
