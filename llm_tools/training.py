"""What one-model train needs: the model that flags name, held-out data, the memory that a step needs."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llm_common.config import (
    ModelConfig,
    Recipe,
    RunConfig,
    TrainConfig,
    preset,
)
from llm_common.data.datasets import TokenDataset, check_data, open_tokens, read_description
from llm_common.data.evaluation import Evaluation, open_held_out
from llm_common.data.shards import find_manifest
from llm_common.errors import UserError, in_flags, notice
from llm_common.files.tensor_files import TensorFiles
from llm_common.run.checkpoint import load_weights
from llm_common.run.estimates import GIB, flops_per_step, memory_advice
from llm_common.run.folder import newest
from llm_common.text.hf_tokenizer import AnyTokenizer


def choose_model(args: argparse.Namespace, seq_len: int) -> tuple[ModelConfig, TensorFiles | None]:
    """The model that flags name, and weights to start from. A preset's positions grow to a longer `seq_len`."""
    given = [name for name in ("preset", "model_config", "init_from") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name.replace('_', '-') for name in given)}: give one of them")
    if args.init_from is not None:
        args.init_from = newest(args.init_from)
        return load_weights(args.init_from)
    if args.model_config is not None:
        return ModelConfig.from_file(args.model_config), None
    cfg = preset(args.preset or "demo")
    if seq_len > cfg.max_position_embeddings:
        notice(f"the preset's {cfg.max_position_embeddings:,} positions become {seq_len:,}, as `seq_len` asks for")
        cfg = dataclasses.replace(cfg, max_position_embeddings=seq_len)
    return cfg, None


def in_words(cfg: ModelConfig) -> str:
    """A model's shape for people."""
    groups = cfg.num_key_value_heads
    heads = f"{cfg.num_attention_heads} heads of {cfg.head_dim}"
    heads += f" ({groups} of keys and values)" if groups != cfg.num_attention_heads else ""
    parts = [f"{cfg.num_hidden_layers} layers of width {cfg.hidden_size:,}", heads, f"MLP {cfg.intermediate_size:,}"]
    parts += [
        f"{cfg.vocab_size:,} tokens",
        f"{cfg.max_position_embeddings:,} positions",
        f"theta {cfg.rope_theta:,.0f}",
    ]
    parts += ["one matrix for embedding and head"] if cfg.tie_word_embeddings else []
    parts += [f"window {cfg.sliding_window:,}"] if cfg.sliding_window else []
    parts += [f"RoPE scaled by {cfg.rope_scaling.factor:g}"] if cfg.rope_scaling else []
    return f"{cfg.model_type}, {', '.join(parts)}"


def amount(number: float, unit: str) -> str:
    """A large number with a prefix: 13.1 GFLOP."""
    power = min(max(int(np.log10(max(number, 1.0)) // 3), 0), 6)
    prefix = ("", "k", "M", "G", "T", "P", "E")[power]
    return f"{number / 1000**power:.3g} {prefix}{unit}"


def check_separator(separator: int | tuple[int, ...] | None, data: dict[str, Any], vocab_size: int) -> None:
    """Raise UserError for a document separator that the data cannot have: with it the mask would separate nothing."""
    given = (separator,) if isinstance(separator, int) else separator or ()
    for i in given:
        if i >= vocab_size:
            raise UserError(f"`document_separator` {i}: the vocabulary has {vocab_size:,} tokens")
    if given and "document_end" in data and data["document_end"] not in given:
        end = "nothing" if data["document_end"] is None else f"token {data['document_end']}"
        raise UserError(
            f"`document_separator` {', '.join(map(str, given))}: documents in the data end with {end}; give that, or "
            "--document-mask alone"
        )


def separator_of(path: Path, data: dict[str, Any]) -> int | None:
    """The id that ends a document in a file of tokens; None for examples, which are rows of their own and hide
    nothing.
    """
    if path.suffix == ".npz":
        notice("--document-mask: every example is a sequence of its own, in which the answer sees its question")
        return None
    if data.get("document_end") is None:
        raise UserError(f"--document-mask: {path} ends no document with a token; prepare it with --document-end TOKEN")
    if data.get("document_ends_inside"):
        raise UserError(
            f"--document-mask: in {path} the token that ends a document, {data['document_end']}, stands "
            f"{data['document_ends_inside']:,} times inside one, where it would hide its beginning; prepare it with "
            "another "
            "--document-end, or name what separates with --document-separator"
        )
    return data["document_end"]


def open_evaluation(
    args: argparse.Namespace, cfg: ModelConfig, train: TrainConfig, config: RunConfig, tokenizer: AnyTokenizer
) -> Evaluation | None:
    path = args.eval_data
    if path is None:
        manifest = find_manifest(args.data)
        path = args.data.with_name(f"{args.data.stem}-validation{args.data.suffix}")
        path = path if manifest is None else manifest.parent.with_name("validation")
        if not path.exists():
            return None
        if manifest is None and not read_description(args.data).get("held_out"):
            notice(
                f"{path} is not taken: {args.data} was made without --validation, and may have the same text; or "
                "give --eval-data"
            )
            return None
    check_data(path, tokenizer)
    return open_held_out(
        path, open_tokens, train.seq_len, train.batch_size, tokenizer.byte_lengths(), config.eval_batches, cfg
    )


def check_memory(
    console: Console, recipe: Recipe, need: dict[str, int], limit: int | None, refuse: bool = True
) -> None:
    """Refuse what cannot fit, before any long work; warn of what may not."""
    if limit is None:
        return
    kept = sum(size for name, size in need.items() if name != "activations")
    text = in_flags(f"{memory_advice(recipe, need)}; the device has {limit / GIB:.2f} GiB")
    if kept > limit and refuse:
        narrower = ", or --compute-dtype float32" if recipe.train.compute_dtype == "float64" else ""
        raise UserError(
            f"not enough memory: weights, moments and gradients alone need {kept / GIB:.2f} GiB, the device has "
            f"{limit / GIB:.2f}; take a smaller model{narrower}, or another --device"
        )
    if sum(need.values()) > limit:
        console.print(f"warning: this may not fit: {text}", markup=False)


def dry_run(
    console: Console,
    recipe: Recipe,
    need: dict[str, int],
    dataset: Any,
    tokenizer: Any,
) -> None:
    cfg, train, opt = recipe.model, recipe.train, recipe.optimizer
    tokens = train.batch_size * train.seq_len
    console.print(f"model: {in_words(cfg)}", markup=False)
    all_tokens, flops = opt.total_steps * tokens, flops_per_step(cfg, train)
    epochs = (
        opt.total_steps
        * train.batch_size
        / (dataset.n_windows if isinstance(dataset, TokenDataset) else len(dataset.answers))
    )
    console.print(
        f"steps: {opt.total_steps:,} of {tokens:,} tokens, {all_tokens:,} in all, which is {epochs:.2f} times the data"
    )
    console.print(f"work: {amount(flops, 'FLOP')} a step, {amount(flops * opt.total_steps, 'FLOP')} in all")
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in need.items() if size)
    console.print(f"memory: about {sum(need.values()) / GIB:.2f} GiB ({parts})")
    inputs, targets = dataset.batch(0)
    console.print(
        f"first batch: {inputs.shape[0]} x {inputs.shape[1]}, {int((targets != -100).sum()):,} counted targets"
    )
    for row in range(min(2, len(inputs))):
        counted = np.flatnonzero(targets[row] != -100)
        shown = inputs[row, : counted[-1] + 1] if len(counted) else inputs[row]
        console.print(f"  input {row}: {tokenizer.decode(shown[:80])!r}", markup=False)
        console.print(f"  target {row}: {tokenizer.decode(targets[row][counted][:80])!r}", markup=False)
