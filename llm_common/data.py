"""Token files and the batches cut from them.

`TokenDataset.batch(step)` is a pure function of (file, seed, step): there is no iterator with hidden state, so both
frameworks see the same batches, resuming is one integer, and any number of hosts shares one global batch.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm_common import random_bits
from llm_common.errors import UserError
from llm_common.tokenizer import Tokenizer

ORDER = 0x6F726465  # folded into the seed's key for the order of the windows: initial weights have keys of their own


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Encode documents, each followed by the end-of-text token, to a `.npy` file with a `.json` beside it.

    Returns the description that the `.json` holds. The smallest unsigned dtype that fits the vocabulary is used.
    """
    if path.suffix != ".npy":
        raise UserError(f"{path}: a token file must end in .npy")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts, n_documents, n_bytes = [], 0, 0
    for document in documents:
        parts.append(np.array(tokenizer.encode(document) + end, dtype))
        n_documents += 1
        n_bytes += len(document.encode("utf-8", errors="replace"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    if not tokens.size:
        raise UserError("the corpus is empty: nothing to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens, allow_pickle=False)
    description = {
        "tokens": int(tokens.size),
        "documents": n_documents,
        "bytes": n_bytes,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint(),
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def check_tokenizer(path: Path | str, tokenizer: Tokenizer) -> None:
    """Raise UserError if a token file says, in the `.json` beside it, that another tokenizer made it."""
    description = Path(path).with_suffix(".json")
    if description.is_file():
        made_by = json.loads(description.read_text(encoding="utf-8")).get("tokenizer")
        if made_by not in (None, tokenizer.fingerprint()):
            raise UserError(
                f"{path}: made by another tokenizer; run scripts/prepare_data.py again, or pass its --tokenizer"
            )


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies: the loss of a model that has learned nothing but them."""
    counts = np.bincount(np.asarray(tokens, np.int64))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class TokenDataset:
    """Windows of T inputs over a memory-mapped token file, in a new keyed order every epoch.

    Window i reads tokens [i*T, i*T + T]: T inputs and, one to the right, T targets; no input is used twice. Samples
    are numbered over all epochs and a batch takes the next `batch_size` of them, so the last batch of an epoch is
    filled from the next one.
    """

    def __init__(
        self, path: Path | str, seq_len: int, batch_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        path = Path(path)
        for name, value, low in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < low:
                raise UserError(f"TokenDataset: {name} = {value} must be at least {low}")
        if not path.is_file():
            raise UserError(f"{path}: no such token file; make one with scripts/prepare_data.py")
        try:
            self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not a token file ({error})") from error
        if not isinstance(self.tokens, np.ndarray):
            raise UserError(f"{path}: an archive of arrays, expected one array in a .npy file")
        if self.tokens.ndim != 1 or not np.issubdtype(self.tokens.dtype, np.integer):
            raise UserError(f"{path}: expected a flat array of integers, got {self.tokens.dtype} {self.tokens.shape}")
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.n_windows = (len(self.tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise UserError(
                f"{path}: {len(self.tokens)} tokens are fewer than one window of seq_len + 1 = {seq_len + 1}"
            )
        if vocab_size is not None:
            low, high = int(self.tokens.min()), int(self.tokens.max())
            if low < 0 or high >= vocab_size:
                bad = low if low < 0 else high
                raise UserError(f"{path}: token id {bad} is outside the model's vocabulary [0, {vocab_size})")
        self._orders: dict[int, np.ndarray] = {}

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records, so that a run cannot be resumed on other data unseen. Reads every token."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), 1 << 24):
            digest.update(self.tokens[start : start + (1 << 24)].tobytes())
        return {
            "tokens": len(self.tokens),
            "sha256": digest.hexdigest(),
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of the windows: they are sorted by random bits."""
        if epoch not in self._orders:
            key = random_bits.fold_in(random_bits.fold_in(random_bits.key(self.seed), ORDER), epoch)
            while len(self._orders) >= 2:  # a batch touches at most the end of one epoch and the start of the next
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.argsort(random_bits.random_bits(key, self.n_windows), kind="stable")
        return self._orders[epoch]

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, each int32 (B / n_hosts, T): this host's rows of the global batch."""
        if step < 0 or not 0 <= host < n_hosts:
            raise UserError(f"batch(step={step}, host={host}, n_hosts={n_hosts}): step and host must lie in range")
        if self.batch_size % n_hosts:
            raise UserError(f"batch_size = {self.batch_size} is not divisible by {n_hosts} hosts")
        rows = self.batch_size // n_hosts
        first = step * self.batch_size + host * rows
        windows = np.empty((rows, self.seq_len + 1), np.int32)
        for row in range(rows):
            epoch, offset = divmod(first + row, self.n_windows)
            start = int(self._order(epoch)[offset]) * self.seq_len
            windows[row] = self.tokens[start : start + self.seq_len + 1]
        return windows[:, :-1], windows[:, 1:]
