"""Token files and the batches cut from them.

`TokenDataset.batch(step)` is a pure function of (file, seed, step): there is no iterator with hidden state, so both
frameworks see the same batches, resuming is one integer, and any number of hosts shares one global batch.
"""

import concurrent.futures
import functools
import hashlib
import io
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_common import random_bits
from llm_common.data.sequences import RULE, DocumentEncoder
from llm_common.data.shards import NOT_AN_ARRAY, ShardedTokens, find_manifest, id_dtype
from llm_common.errors import (
    UserError,
    has_its_checksum,
    json_bytes,
    read_json,
    sha256_of,
    with_checksum,
    write_whole,
)
from llm_common.text.hf_tokenizer import AnyTokenizer

HASHED_AT_ONCE = 1 << 24  # ids
ORDER = 0x6F726465  # folded into the seed's key for the order of the windows: initial weights have keys of their own


def write_tokens(
    path: Path, documents: Iterable[str], encoder: DocumentEncoder | AnyTokenizer, held_out: float = 0.0
) -> dict[str, Any]:
    """Encode documents to a `.npy` file with a `.json` beside it. Returns the description that the `.json` holds.

    encoder: or the tokenizer of one with its defaults. held_out: the share of documents that the file beside it has.
    The smallest unsigned dtype that fits the vocabulary is used.
    """
    if path.suffix != ".npy":
        raise UserError(f"{path}: a token file must end in .npy")
    encoder = encoder if isinstance(encoder, DocumentEncoder) else DocumentEncoder(encoder)
    encoder.ends_inside = 0  # those of the file that was written before are not this one's
    dtype, n_documents, n_bytes = id_dtype(encoder.tokenizer), 0, 0
    parts: list[np.ndarray] = []
    for document in documents:
        parts.append(np.array(encoder(document), dtype))
        n_documents += 1
        n_bytes += len(document.encode("utf-8", errors="replace"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    if not tokens.size:
        raise UserError("the corpus is empty: nothing to write")
    file = io.BytesIO()
    np.save(file, tokens, allow_pickle=False)
    counts = {"tokens": int(tokens.size), "documents": n_documents, "bytes": n_bytes, "held_out": held_out}
    return write_described(path, file.getvalue(), {**counts, **encoder.describe()})


def write_described(path: Path, content: bytes, description: dict[str, Any]) -> dict[str, Any]:
    """Write a data file and the `.json` beside it, which holds its size and sha256; returns what the `.json` holds.

    A kill at any moment leaves a pair that belongs together: the new description waits under another name until its
    file is in place, where `read_description` finds it.
    """
    where, waiting = _description_path(path)
    if path.exists() and not any(x.exists() for x in (where, waiting, path.with_suffix(".json"))):
        raise UserError(f"{path}: is there already, and was not made by this program; give another `out`")
    if waiting.is_file() and path.is_file() and sha256_of(path).encode() in waiting.read_bytes():
        waiting.replace(where)  # an earlier write was killed at its very end
    described = with_checksum(
        {**description, "file": path.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    )
    write_whole(waiting, json_bytes(described))
    write_whole(path, content)
    waiting.replace(where)
    return described


def _description_path(path: Path) -> tuple[Path, Path]:
    """Where the description of a data file is, and where it waits while the file is written."""
    where = path.with_name(
        f"{path.name}.json"
    )  # not tokens.json, which may be the very text that tokens.npy is made of
    return where, where.with_name(f".{where.name}.next")


def read_description(path: Path) -> dict[str, Any]:
    """What the `.json` beside a data file says, after comparing the file's size and sha256 with it.

    Raises UserError if there is none, if it was made by another rule, or if it or the file is damaged.
    """
    again = "make it again with one-model prepare-data"
    if not path.is_file():
        raise UserError(f"{path}: no such file of data; make one with one-model prepare-data")
    where, waiting = _description_path(path)
    if not where.is_file() and not waiting.is_file():
        old = f" (rule 1 had {path.with_suffix('.json').name})" if path.with_suffix(".json").is_file() else ""
        raise UserError(f"{path}: no {where.name} beside it says which tokenizer and which rule made it{old}; {again}")
    found = None
    for place in (where, waiting):
        if not place.is_file():
            continue
        content = read_json(place)
        if not isinstance(content, dict):
            raise UserError(f"{place}: expected an object with keys; {again}")
        if content.get("rule") != RULE:
            raise UserError(
                f"{path}: made by rule {content.get('rule', 1)!r} of how documents become tokens; this version has "
                f"rule {RULE} "
                f"(what stands before and after a document); {again}"
            )
        if not has_its_checksum(content):
            raise UserError(f"{place}: damaged (its checksum is not that of its content); {again}")
        if content.get("file") != path.name:
            raise UserError(f"{place}: describes {content.get('file')!r}, not {path.name}; give the two other names")
        found = found or content
        if path.stat().st_size == content["size"] and sha256_of(path) == content["sha256"]:
            return content
    assert found is not None
    raise UserError(f"{path}: damaged (its sha256 is not the one that {where.name} says); {again}")


def check_data(path: Path | str, tokenizer: AnyTokenizer | None = None) -> dict[str, Any]:
    """What the description of a data file, or the manifest of a folder of shards, says, after comparing every byte with
    it.

    Raises UserError for data that is damaged, made by another rule, or, with a tokenizer given, made by another one.
    """
    path = Path(path)
    manifest = find_manifest(path)
    if manifest is None:
        open_tokens(
            path
        ) if path.suffix != ".npz" else None  # says of a folder that it is not finished, or no data at all
        description = read_description(path)
    else:
        tokens = ShardedTokens(manifest)
        tokens.check()
        description = tokens.manifest
    if tokenizer is not None and description.get("tokenizer") != tokenizer.fingerprint():
        raise UserError(f"{path}: made by another tokenizer; run one-model prepare-data again, or pass its `tokenizer`")
    return description


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
    """A new keyed permutation of n samples every epoch, samples being numbered over all epochs. Nothing is stored: any
    number of samples, and any one of them at once.

    A Feistel network permutes the numbers below the next power of 4; what falls outside [0, n) goes through it again,
    until it is inside. Source: Luby and Rackoff 1988; "cycle walking": Black and Rogaway 2002.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half of a number
        self._keys: tuple[int, list[int]] = (-1, [])  # of the last epoch

    def __call__(self, number: int) -> int:
        """Which of the n samples is the one with this number."""
        epoch, x = divmod(number, self.n)
        of_epoch, keys = self._keys  # read once: threads may share this object, each in another epoch
        if epoch != of_epoch:
            key = random_bits.fold_in(random_bits.fold_in(random_bits.key(self.seed), ORDER), epoch)
            keys = random_bits.random_bits(key, self.ROUNDS).tolist()
            self._keys = epoch, keys
        mask = (1 << self._bits) - 1
        while True:
            left, right = x >> self._bits, x & mask
            for key in keys:
                left, right = right, left ^ (mix(right ^ key) & mask)
            x = left << self._bits | right
            if x < self.n:
                return x


def mix(x: int) -> int:
    """A 32-bit number; each of its bits depends on every bit of x. Constants: Wellons' "lowbias32"."""
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
        unfinished = f"{path}: not finished; run the same one-model prepare-data again, which goes on where it stopped"
        raise UserError(
            unfinished
            if (path / "parts").is_dir()
            else f"{path}: a folder without shards; give the .npy file in it, or one that one-model prepare-data wrote"
            if path.is_dir()
            else f"{path}: no such token file; make one with one-model prepare-data"
        )
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except NOT_AN_ARRAY as error:
        raise UserError(f"{path}: not a token file; make one with one-model prepare-data") from error
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path}: an archive of arrays, expected one array in a .npy file")
    return check_flat(tokens, str(path))


def check_flat(tokens: np.ndarray, where: str) -> np.ndarray:
    """The tokens. Raises UserError, which begins with `where`, unless they are a flat array of integers."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{where}: expected a flat array of integers, got {tokens.dtype} {tokens.shape}")
    return tokens


class TokenDataset:
    """Windows of T inputs over a memory-mapped token file or a folder of shards, in a new keyed order every epoch.

    Window i reads tokens [i*T, i*T + T]: T inputs and, one to the right, T targets; no input is used twice. Samples
    are numbered over all epochs and a batch takes the next `batch_size` of them, so the last batch of an epoch is
    filled from the next one.

    source: the file or folder, or the ids themselves, (number of tokens,). stride: how far apart windows begin, None
    for seq_len; with 1 every place of the text begins one.
    """

    def __init__(
        self,
        source: Path | str | np.ndarray,
        seq_len: int,
        batch_size: int,
        seed: int,
        vocab_size: int | None = None,
        stride: int | None = None,
    ) -> None:
        path: Path | str = "tokens" if isinstance(source, np.ndarray) else Path(source)
        self.stride = seq_len if stride is None else stride
        for name, value, low in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("stride", self.stride, 1),
        ):
            if value < low:
                raise UserError(f"TokenDataset: {name} = {value} must be at least {low}")
        self.tokens = check_flat(source, "tokens") if isinstance(source, np.ndarray) else open_tokens(Path(source))
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.n_windows = (len(self.tokens) - 1 - seq_len) // self.stride + 1
        if self.n_windows < 1:
            raise UserError(
                f"{path}: {len(self.tokens)} tokens are fewer than one window of seq_len + 1 = {seq_len + 1}"
            )
        if vocab_size is not None or isinstance(source, np.ndarray):
            low, high = int(self.tokens.min()), int(self.tokens.max())
            most = 2**31 if vocab_size is None else vocab_size  # batches are int32
            if low < 0 or high >= most:
                bad = low if low < 0 else high
                raise UserError(f"{path}: token id {bad} is outside the model's vocabulary [0, {most})")
        self._order = Order(self.n_windows, seed)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records, so that a run cannot be resumed on other data unseen. Reads every token, once."""
        return {
            "tokens": len(self.tokens),
            "sha256": self._sha256,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **({} if self.stride == self.seq_len else {"stride": self.stride}),
        }

    @functools.cached_property
    def _sha256(self) -> str:
        if isinstance(self.tokens, ShardedTokens):
            self.tokens.check()
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), HASHED_AT_ONCE):
            digest.update(self.tokens[start : start + HASHED_AT_ONCE].tobytes())
        return digest.hexdigest()

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, each int32 (B / n_hosts, T): this host's rows of the global batch."""
        numbers = host_rows(step, self.batch_size, host, n_hosts)
        windows = np.empty((len(numbers), self.seq_len + 1), np.int32)
        for row, number in enumerate(numbers):
            start = self._order(number) * self.stride
            windows[row] = self.tokens[start : start + self.seq_len + 1]
        return windows[:, :-1], windows[:, 1:]

    def windows(self) -> "Windows":
        """The same windows for other people's loaders."""
        return Windows(self)


class Windows:
    """The windows of a dataset by number, in the file's order, for loaders that shuffle and batch by themselves.

    It has what `torch.utils.data.DataLoader` asks of a map-style dataset and Grain of a random-access data source: a
    length and items {"inputs", "targets"}, each int32 (T,).
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.n_windows

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        number = operator.index(number)
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        start = number * self.dataset.stride
        window = self.dataset.tokens[start : start + self.dataset.seq_len + 1].astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}


class Prefetch:
    """A dataset whose next batch is read in a thread while this one is worked on. Batches are pure, so they stay the
    same.
    """

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
