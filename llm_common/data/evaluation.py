"""The loss on held-out data: token files, examples, or documents as lm-eval reads them.

Every kind gives rows of inputs and targets of one shape; targets of -100 are not counted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from llm_common.data.answers import IGNORED, example_row, load_examples
from llm_common.data.shards import ShardedTokens
from llm_common.errors import UserError
from llm_common.tensors import bucket, check_token_ids

EvaluateLoss = Callable[["Evaluation"], tuple[float, int]]  # sum of the losses in nats, and how many tokens


class Stopped(Exception):
    """An evaluation was asked to end before its end."""


class Evaluation:
    """Held-out tokens cut into windows of `seq_len` inputs, in order; every token but the first is predicted once.

    byte_lengths: how many bytes each id stands for, for bits per byte. max_batches: only the first few batches.
    stop: asked before every batch; if it says True, `batches` raises `Stopped`.
    """

    stop: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(
        self,
        tokens: np.ndarray | ShardedTokens,
        seq_len: int,
        batch_size: int,
        byte_lengths: np.ndarray | None = None,
        max_batches: int | None = None,
    ) -> None:
        if len(tokens) < 2:
            raise UserError(f"{len(tokens)} held-out tokens: at least 2 are needed")
        self.tokens, self.seq_len = tokens, seq_len
        self._batch(math.ceil((len(tokens) - 1) / seq_len), batch_size, byte_lengths, max_batches)
        self.n_targets = min(len(tokens) - 1, self.n_batches * batch_size * seq_len)

    def _batch(self, rows: int, batch_size: int, byte_lengths: np.ndarray | None, max_batches: int | None) -> None:
        self.batch_size, self.byte_lengths = batch_size, byte_lengths
        batches = math.ceil(rows / batch_size)
        self.n_batches = batches if max_batches is None else min(batches, max_batches)
        self.n_rows = min(rows, self.n_batches * batch_size)

    def check(self, vocab_size: int, what: str) -> None:
        """Raise UserError for an id that a model with `vocab_size` embeddings does not have."""
        check_token_ids(np.array([self.tokens.min(), self.tokens.max()]).astype(np.int64), vocab_size, what)

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Write a row's inputs and targets, (T,) each, over zeros and -100."""
        start = row * self.seq_len
        window = self.tokens[start : start + self.seq_len + 1]
        inputs[: len(window) - 1], targets[: len(window) - 1] = window[:-1], window[1:]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets, each int32 (B, T); targets of -100 are not counted. All batches have one shape."""
        for i in range(self.n_batches):
            if self.stop():
                raise Stopped
            inputs = np.zeros((self.batch_size, self.seq_len), np.int32)
            targets = np.full((self.batch_size, self.seq_len), IGNORED, np.int32)
            for row in range(min(self.batch_size, self.n_rows - i * self.batch_size)):
                self.fill(i * self.batch_size + row, inputs[row], targets[row])
            yield inputs, targets

    def n_bytes(self) -> int | None:
        """How many bytes of text the counted targets are, or None if that is not known."""
        if self.byte_lengths is None:
            return None
        return int(self.byte_lengths[np.asarray(self.tokens[1 : 1 + self.n_targets], np.int64)].sum())

    def summary(self, total: float, count: int) -> dict[str, Any]:
        """loss (nats per token), perplexity, tokens, and, if the bytes are known, bytes and bits_per_byte."""
        if count == 0:
            raise UserError("no held-out token is counted: nothing to evaluate")
        loss, n_bytes = total / count, self.n_bytes()
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}
        if n_bytes is not None:
            result |= {"bytes": n_bytes, "bits_per_byte": total / math.log(2) / max(n_bytes, 1)}
        return result


class ExampleEvaluation(Evaluation):
    """Held-out examples, one a row, in order: only the answers' tokens are counted, as in training."""

    def __init__(
        self,
        path: Path,
        seq_len: int | None,
        batch_size: int,
        byte_lengths: np.ndarray | None = None,
        max_batches: int | None = None,
    ) -> None:
        """seq_len: None for the longest example's."""
        self.tokens, self.starts, self.answers = load_examples(path)
        longest = int(np.diff(self.starts).max())
        self.seq_len = longest - 1 if seq_len is None else seq_len
        if longest > self.seq_len + 1:
            raise UserError(
                f"{path}: the longest example has {longest} tokens, so `seq_len` must be at least {longest - 1} (it "
                f"is {seq_len})"
            )
        self._batch(len(self.answers), batch_size, byte_lengths, max_batches)
        self.n_targets = int((self.starts[1:] - self.answers)[: self.n_rows].sum())

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        example_row(self.tokens, self.starts[row], self.answers[row], self.starts[row + 1], inputs, targets)

    def n_bytes(self) -> int | None:
        if self.byte_lengths is None:
            return None
        stretches = zip(self.answers[: self.n_rows], self.starts[1:], strict=False)
        return sum(int(self.byte_lengths[self.tokens[start:end].astype(np.int64)].sum()) for start, end in stretches)


class DocumentEvaluation(Evaluation):
    """Documents one by one, in the windows of lm-eval's rolling likelihood, so that its perplexities are these.

    A document's first token is predicted from `context`, what the tokenizer puts before a text; if that is empty it is
    not predicted. Every other token is predicted once: windows follow each other, each beginning with the last token of
    the one before, but for the last, which reaches as far back as a window does. n_bytes: the bytes of all documents.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], context: Sequence[int], length: int, batch_size: int, n_bytes: int,
        max_batches: int | None = None,
    ) -> None:  # fmt: skip
        """length: of a window at most; if all documents are shorter, windows are."""
        self._documents = [np.array(ids, np.int64) for ids in documents if len(ids)]
        self.context, self._bytes = list(context), n_bytes
        if not any(len(ids) + len(self.context) > 1 for ids in self._documents):
            raise UserError("no held-out tokens: the text is empty, or a single token")
        if len(self.context) > length:
            raise UserError(
                f"a window of {length} positions has no room for the {len(self.context)} tokens before a text"
            )
        longest = max(len(ids) for ids in self._documents) + len(self.context) - 1
        self.seq_len = bucket(longest, length) if longest < length else length
        self._windows = [
            (number, start, end) for number, ids in enumerate(self._documents) for start, end in self._of(len(ids))
        ]
        self._batch(len(self._windows), batch_size, None, max_batches)
        self._whole = self.n_rows == len(self._windows)
        self.n_targets = sum(end - start for _, start, end in self._windows[: self.n_rows])

    def _of(self, n: int) -> Iterator[tuple[int, int]]:
        """The stretches of a document of n tokens that are predicted together."""
        start = 0 if self.context else 1
        end = min(n, self.seq_len - len(self.context) + 1) if self.context else min(n, self.seq_len + 1)
        while start < n:
            yield start, end
            start, end = end, min(n, end + self.seq_len)

    def check(self, vocab_size: int, what: str) -> None:
        for ids in (*self._documents, np.array(self.context, np.int64)):
            check_token_ids(ids, vocab_size, what)

    def fill(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        number, start, end = self._windows[row]
        ids = np.concatenate([np.array(self.context, np.int64), self._documents[number]])
        start, end = start + len(self.context), end + len(self.context)
        first = max(0, end - 1 - self.seq_len)
        inputs[: end - 1 - first] = ids[first : end - 1]
        targets[start - 1 - first : end - 1 - first] = ids[start:end]

    def n_bytes(self) -> int | None:
        """Of all documents; not known of a part of them."""
        return self._bytes if self._whole else None


def open_held_out(
    path: Path,
    tokens: Callable[[Path], np.ndarray | ShardedTokens],
    seq_len: int | None,
    batch_size: int,
    byte_lengths: np.ndarray | None,
    max_batches: int | None,
    cfg: ModelConfig,
) -> Evaluation:
    """The evaluation of a data file: `.npz` holds examples, anything else tokens, which `tokens` opens."""
    if path.suffix == ".npz":
        evaluation = ExampleEvaluation(path, seq_len, batch_size, byte_lengths, max_batches)
    else:
        length = min(1024, cfg.max_position_embeddings) if seq_len is None else seq_len
        evaluation = Evaluation(tokens(path), length, batch_size, byte_lengths, max_batches)
    evaluation.check(cfg.vocab_size, str(path))
    return evaluation
