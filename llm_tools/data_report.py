"""What one-model inspect-data shows of data: counts, lengths, samples and pictures."""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llm_common.data.answers import load_examples
from llm_common.data.datasets import entropy
from llm_common.data.shards import ShardedTokens
from llm_common.errors import UserError
from llm_common.text.hf_tokenizer import AnyTokenizer

PIECE = 1 << 24  # ids read at once


def inspect_examples(console: Console, args: argparse.Namespace, tokenizer: AnyTokenizer) -> None:
    tokens, starts, answers = load_examples(args.data)
    lengths, counts = np.diff(starts), np.bincount(tokens)
    if len(counts) > tokenizer.vocab_size:
        raise UserError(
            f"{args.data}: id {len(counts) - 1} is not in the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    learned = starts[1:] - answers
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, values in (("examples", lengths), ("prompts", lengths - learned), ("answers", learned)):
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        table.add_row(
            name,
            f"{middle:,.0f} tokens (median), {low:,.0f} to {high:,.0f} (9 in 10), {values.max():,} at most, "
            f"{int(values.sum()):,} in all",
        )
    console.print(f"{len(lengths):,} example{'s' if len(lengths) > 1 else ''}; only the answers are learned")
    console.print(table)
    show_frequent(console, tokenizer, counts, args.top)
    rng = np.random.default_rng(args.seed)
    for i in sorted(rng.choice(len(lengths), min(args.samples, len(lengths)), replace=False).tolist()):
        console.rule(f"example {i}", align="left")
        for name, ids in (("prompt", tokens[starts[i] : answers[i]]), ("answer", tokens[answers[i] : starts[i + 1]])):
            console.print(f"{name}: {tokenizer.decode(ids.tolist())!r}", markup=False, highlight=False)
    if args.out is not None:
        draw(args.out, counts, lengths)
        console.print(f"{args.out}: lengths of examples, frequencies of tokens", markup=False)


def read(tokens: np.ndarray | ShardedTokens, document_end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """How often each id occurs, and the documents' lengths in tokens, their end included; one length if nothing ends
    them.
    """
    counts, ends = np.zeros(0, np.int64), [np.zeros(0, np.int64)]
    for start in range(0, len(tokens), PIECE):
        ids = tokens[start : start + PIECE]
        found = np.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        if document_end is not None:
            ends.append(start + 1 + np.flatnonzero(ids == document_end))
    at = np.unique(np.concatenate([*ends, np.array([len(tokens)])]))  # the last may end without a token for it
    return counts, np.diff(at, prepend=0)


def report(
    console: Console,
    tokens: np.ndarray | ShardedTokens,
    tokenizer: AnyTokenizer,
    counts: np.ndarray,
    lengths: np.ndarray,
    top: int,
) -> None:
    used, n_bytes = int((counts > 0).sum()), int((counts * tokenizer.byte_lengths()[: len(counts)]).sum())
    share = np.sort(counts)[::-1].cumsum() / counts.sum()
    low, middle, high = np.quantile(lengths, (0.05, 0.5, 0.95))
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in (
        ("tokens", f"{len(tokens):,} {tokens.dtype}, {n_bytes / len(tokens):.2f} bytes each"),
        ("documents", f"{len(lengths):,}"),
        (
            "their lengths",
            f"{middle:,.0f} tokens (median), {low:,.0f} to {high:,.0f} (9 in 10), {lengths.max():,} at most",
        ),
        (
            "vocabulary",
            f"{used:,} of {tokenizer.vocab_size:,} ids occur; half the text is {1 + int((share < 0.5).sum()):,} of "
            "them",
        ),
        ("unigram entropy", f"{entropy(counts):.3f} nats: the loss of a model that knows the frequencies alone"),
    ):
        table.add_row(*row)
    console.print(table)
    show_frequent(console, tokenizer, counts, top)


def show_frequent(console: Console, tokenizer: AnyTokenizer, counts: np.ndarray, top: int) -> None:
    frequent = Table("id", "token", "times", "share", title="most frequent tokens", title_justify="left")
    for i in np.argsort(-counts, kind="stable")[:top].tolist():
        frequent.add_row(
            str(i), repr(tokenizer.decode([i])), f"{counts[i]:,}", f"{100 * counts[i] / counts.sum():.2f} %"
        )
    console.print(frequent)


def draw(path: Path, counts: np.ndarray, lengths: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.geomspace(1, max(2, lengths.max()) * 1.01, 40)
    left.hist(lengths, bins=bins.tolist(), color="#4477aa")
    left.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Lengths")
    ordered = np.sort(counts[counts > 0])[::-1]
    right.plot(np.arange(1, 1 + len(ordered)), ordered, color="#4477aa")
    right.set(xscale="log", yscale="log", xlabel="rank of a token", ylabel="times", title="Frequencies")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
