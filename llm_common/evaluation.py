"""The loss on held-out tokens: windows in order, every token but the first predicted once."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_common.errors import UserError
from llm_common.shards import ShardedTokens
from llm_common.tensors import check_token_ids

EvaluateLoss = Callable[["Evaluation"], tuple[float, int]]  # sum of the losses in nats, and how many tokens


class Evaluation:
    """Held-out tokens cut into windows of `seq_len` inputs; the last one is padded, and the padding is not counted.

    byte_lengths: how many bytes each id stands for, for bits per byte. max_batches: only the first few batches.
    """

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
        self.tokens, self.seq_len, self.batch_size, self.byte_lengths = tokens, seq_len, batch_size, byte_lengths
        windows = math.ceil((len(tokens) - 1) / seq_len)
        batches = math.ceil(windows / batch_size)
        self.n_batches = batches if max_batches is None else min(batches, max_batches)
        self.n_targets = min(len(tokens) - 1, self.n_batches * batch_size * seq_len)

    def check(self, vocab_size: int, what: str) -> None:
        """Raise UserError for an id that a model with `vocab_size` embeddings does not have."""
        check_token_ids(np.array([self.tokens.min(), self.tokens.max()]).astype(np.int64), vocab_size, what)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets, each int32 (B, T); targets of -100 are not counted. All batches have one shape."""
        for i in range(self.n_batches):
            inputs = np.zeros((self.batch_size, self.seq_len), np.int32)
            targets = np.full((self.batch_size, self.seq_len), -100, np.int32)
            for row in range(self.batch_size):
                start = (i * self.batch_size + row) * self.seq_len
                window = self.tokens[start : start + self.seq_len + 1]
                if len(window) > 1:
                    inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
            yield inputs, targets

    def summary(self, total: float, count: int) -> dict[str, Any]:
        """loss (nats per token), perplexity, tokens, and, if the bytes are known, bytes and bits_per_byte."""
        loss = total / count
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}
        if self.byte_lengths is not None:
            n_bytes = int(self.byte_lengths[np.asarray(self.tokens[1 : 1 + self.n_targets], np.int64)].sum())
            result |= {"bytes": n_bytes, "bits_per_byte": total / math.log(2) / max(n_bytes, 1)}
        return result
