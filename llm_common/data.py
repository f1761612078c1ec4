"""Token files and the batches cut from them.

`TokenDataset.batch(step)` is a pure function of (file, seed, step): there is no iterator with hidden state, so both
frameworks see the same batches, resuming is one integer, and any number of hosts shares one global batch.
"""

import concurrent.futures
import hashlib
import io
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_common import random_bits
from llm_common.errors import UserError, read_json, write_whole
from llm_common.hf_tokenizer import AnyTokenizer
from llm_common.shards import ShardedTokens, find_manifest, id_dtype

ORDER = 0x6F726465  # folded into the seed's key for the order of the windows: initial weights have keys of their own


def write_tokens(path: Path, documents: Iterable[str], tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Encode documents, each followed by the end-of-text token, to a `.npy` file with a `.json` beside it.

    Returns the description that the `.json` holds. The smallest unsigned dtype that fits the vocabulary is used.
    """
    if path.suffix != ".npy":
        raise UserError(f"{path}: a token file must end in .npy")
    dtype = id_dtype(tokenizer)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts, n_documents, n_bytes = [], 0, 0
    for document in documents:
        parts.append(np.array(tokenizer.encode(document) + end, dtype))
        n_documents += 1
        n_bytes += len(document.encode("utf-8", errors="replace"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    if not tokens.size:
        raise UserError("the corpus is empty: nothing to write")
    file = io.BytesIO()
    np.save(file, tokens, allow_pickle=False)
    write_whole(path, file.getvalue())
    counts = {"tokens": int(tokens.size), "documents": n_documents, "bytes": n_bytes}
    return write_description(path, tokenizer, counts)


def write_description(path: Path, tokenizer: AnyTokenizer, counts: dict[str, Any]) -> dict[str, Any]:
    """Write the `.json` beside a data file: its counts, and the tokenizer that made it. Returns its contents."""
    description = {**counts, "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint()}
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def check_tokenizer(path: Path | str, tokenizer: AnyTokenizer) -> None:
    """Raise UserError if a token file says, in the `.json` beside it, that another tokenizer made it."""
    description = find_manifest(Path(path)) or Path(path).with_suffix(".json")
    if description.is_file():
        content = read_json(description)
        made_by = content.get("tokenizer") if isinstance(content, dict) else None
        if made_by not in (None, tokenizer.fingerprint()):
            raise UserError(
                f"{path}: made by another tokenizer; run scripts/prepare_data.py again, or pass its --tokenizer"
            )


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies: the loss of a model that has learned nothing but them."""
    return entropy(np.bincount(np.asarray(tokens, np.int64)))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of things that occur so often."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class Dataset(Protocol):
    """What training needs of its data: batches as a pure function of the step."""

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, each (B / n_hosts, T): a host's rows of the global batch."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records, so that a run cannot be resumed on other data unseen."""
        ...


class Order:
    """A new keyed permutation of n samples every epoch, samples being numbered over all epochs. Nothing is stored: any number of
    samples, and any one of them at once.

    A Feistel network permutes the numbers below the next power of 4; what falls outside [0, n) goes through it again, until
    it is inside. Source: Luby and Rackoff 1988; "cycle walking": Black and Rogaway 2002.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half of a number
        self._keys: tuple[int, list[int]] = (-1, [])  # of the last epoch

    def __call__(self, number: int) -> int:
        """Which of the n samples is the one with this number."""
        epoch, x = divmod(number, self.n)
        if epoch != self._keys[0]:
            key = random_bits.fold_in(random_bits.fold_in(random_bits.key(self.seed), ORDER), epoch)
            self._keys = epoch, random_bits.random_bits(key, self.ROUNDS).tolist()
        mask = (1 << self._bits) - 1
        while True:
            left, right = x >> self._bits, x & mask
            for key in self._keys[1]:
                left, right = right, left ^ (mix(right ^ key) & mask)
            x = left << self._bits | right
            if x < self.n:
                return x


def mix(x: int) -> int:
    """A 32-bit number of which every bit depends on every bit of x. Constants: Wellons' "lowbias32"."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def host_rows(step: int, batch_size: int, host: int, n_hosts: int) -> range:
    """The numbers of the samples in a host's rows of a step's global batch."""
    if step < 0 or not 0 <= host < n_hosts:
        raise UserError(f"batch(step={step}, host={host}, n_hosts={n_hosts}): step and host must lie in range")
    if batch_size % n_hosts:
        raise UserError(f"batch_size = {batch_size} is not divisible by {n_hosts} hosts")
    rows = batch_size // n_hosts
    first = step * batch_size + host * rows
    return range(first, first + rows)


def open_tokens(path: Path) -> np.ndarray | ShardedTokens:
    """The ids of a token file, or of a folder of shards. Raises UserError if it is neither, or damaged."""
    manifest = find_manifest(path)
    if manifest is not None:
        return ShardedTokens(manifest)
    if not path.is_file():
        unfinished = f"{path}: not finished; run the same scripts/prepare_data.py again, which goes on where it stopped"
        raise UserError(
            unfinished
            if (path / "parts").is_dir()
            else f"{path}: no such token file; make one with scripts/prepare_data.py"
        )
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a token file; make one with scripts/prepare_data.py") from error
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path}: an archive of arrays, expected one array in a .npy file")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path}: expected a flat array of integers, got {tokens.dtype} {tokens.shape}")
    return tokens


class TokenDataset:
    """Windows of T inputs over a memory-mapped token file or a folder of shards, in a new keyed order every epoch.

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
        self.tokens = open_tokens(path)
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
        self._order = Order(self.n_windows, seed)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records, so that a run cannot be resumed on other data unseen. Reads every token."""
        if isinstance(self.tokens, ShardedTokens):
            self.tokens.check()
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

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, each int32 (B / n_hosts, T): this host's rows of the global batch."""
        numbers = host_rows(step, self.batch_size, host, n_hosts)
        windows = np.empty((len(numbers), self.seq_len + 1), np.int32)
        for row, number in enumerate(numbers):
            start = self._order(number) * self.seq_len
            windows[row] = self.tokens[start : start + self.seq_len + 1]
        return windows[:, :-1], windows[:, 1:]

    def windows(self) -> "Windows":
        """The same windows for other people's loaders."""
        return Windows(self)


class Windows:
    """The windows of a dataset by number, in the file's order, for loaders that shuffle and batch by themselves.

    It has what `torch.utils.data.DataLoader` asks of a map-style dataset and Grain of a random-access data source: a length and
    items {"inputs", "targets"}, each int32 (T,).
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.n_windows

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        length = self.dataset.seq_len
        window = self.dataset.tokens[number * length : (number + 1) * length + 1].astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}


class Prefetch:
    """A dataset whose next batch is read in a thread while this one is worked on. Batches are pure, so they stay the same."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self._waiting: dict[tuple[int, int, int], concurrent.futures.Future[tuple[np.ndarray, np.ndarray]]] = {}

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The dataset's own batch; what reading it raised is raised here."""
        found = self._waiting.pop((step, host, n_hosts), None)
        self._waiting = {key: future for key, future in self._waiting.items() if key[0] >= step}
        batch = self.dataset.batch(step, host, n_hosts) if found is None else found.result()
        self._waiting[step + 1, host, n_hosts] = self._pool.submit(self.dataset.batch, step + 1, host, n_hosts)
        return batch

    def fingerprint(self) -> dict[str, Any]:
        """The dataset's."""
        return self.dataset.fingerprint()
