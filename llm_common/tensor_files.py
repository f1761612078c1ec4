"""safetensors files: written durable and read back, and read lazily through a memory map.

The library validates a file; what it lets pass (duplicate names, names that look like paths) is refused here, and bfloat16,
which NumPy does not have, is turned into float32 here. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from llm_common.errors import UserError, read_json

LARGEST_HEADER = 100_000_000  # bytes, the library's own limit
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
INDEX_FILE, MODEL_FILE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 << 30  # of a file, about


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies; `dtype` is that of the array that reading it gives."""

    file: int  # descriptor
    stored: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files, each read when it is asked for, so that only one is in memory.

    A tensor is a read-only view of the file, or a float32 array if the file holds bfloat16. The files stay open: they may
    be renamed or deleted meanwhile. Raises UserError, by name, for whatever is not a well-formed file of float tensors.
    """

    def __init__(self, *paths: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self.headers: list[bytes] = []
        for path in paths:
            for name, entry in self._open(path):
                if name in self.entries:
                    raise UserError(f"{path}: tensor {name!r} is in another file too")
                self.entries[name] = entry

    def _open(self, path: Path) -> Iterator[tuple[str, Entry]]:
        check_plain_file(path)
        try:
            safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if length > LARGEST_HEADER:
            raise UserError(f"{path}: a header of {length:,} bytes; at most {LARGEST_HEADER:,} are read")
        header = os.pread(descriptor, length, 8)
        self.headers.append(header)
        try:
            content = json.loads(header, object_pairs_hook=lambda pairs: _unique(path, pairs))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: the header is not JSON ({type(error).__name__})") from None
        for name, value in content.items():
            if name == "__metadata__":
                continue
            if "/" in name or "\\" in name or "\0" in name:
                raise UserError(f"{path}: {name!r} is a path, not the name of a tensor")
            if value["dtype"] not in STORED:
                raise UserError(f"{path}: tensor {name!r} is {value['dtype']}, but weights are floating-point numbers")
            stored, shape = np.dtype(STORED[value["dtype"]]), tuple(value["shape"])
            start, end = value["data_offsets"]
            if end - start != math.prod(shape) * stored.itemsize or 8 + length + end > os.fstat(descriptor).st_size:
                raise UserError(f"{path}: tensor {name!r} does not fit its shape {shape} or the file")
            dtype = np.dtype(np.float32) if value["dtype"] == "BF16" else stored
            yield name, Entry(descriptor, value["dtype"], dtype, shape, 8 + length + start, end - start)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.size == 0:
            return np.zeros(entry.shape, entry.dtype)
        start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = entry.offset - start
        mapped = mmap.mmap(entry.file, skipped + entry.size, offset=start, access=mmap.ACCESS_READ)
        stored = np.frombuffer(mapped, STORED[entry.stored], math.prod(entry.shape), skipped).reshape(entry.shape)
        if entry.stored != "BF16":
            return stored
        wide = stored.astype(np.uint32)  # bfloat16 is the upper half of a float32
        wide <<= 16
        return wide.view(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def without(self, *names: str) -> "TensorFiles":
        """The same files, less some tensors."""
        for name in names:
            self.entries.pop(name, None)
        return self


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        keys = [name for name, _ in pairs]
        raise UserError(f"{path}: {max(keys, key=keys.count)!r} is there twice")
    return names


def check_plain_file(path: Path) -> None:
    """Raise UserError unless a path is a plain file or, as in the hub's cache, a link into the `blobs` folder beside it."""
    try:
        if path.is_symlink() and path.resolve().parent != (path.parent.parent.parent / "blobs").resolve():
            raise UserError(f"{path}: a link to elsewhere; put the file itself there")
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path}: cannot be opened ({error})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a plain file")


def plan_shards(
    file: str, sizes: Mapping[str, int], least: int = 1, shard_bytes: int = SHARD_BYTES
) -> dict[str, list[str]]:
    """Which tensors, of these sizes in bytes, go to which files: in order, at least `least` files, of about `shard_bytes` each.

    file: the name if there is one, "model.safetensors"; several are "model-00001-of-00003.safetensors" and so on.
    """
    limit = min(shard_bytes, -(-sum(sizes.values()) // least))
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    n, stem = len(shards), file.removesuffix(".safetensors")
    names = [file] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    return dict(zip(names, shards, strict=True))


def shard_index(plan: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The contents of the index file that belongs to several shards."""
    weight_map = {name: file for file, names in plan.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def open_model_files(folder: Path, file: str = MODEL_FILE) -> TensorFiles:
    """The tensors of a folder: those of `file`, or of the shards that the index beside it (`file`.index.json) lists."""
    index = folder / f"{file}.index.json"
    if not index.is_file():
        if not (folder / file).exists() and (pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))):
            raise UserError(
                f"{pickles[0]}: a pickle can run code and is not read; save the model with transformers as safetensors"
            )
        return TensorFiles(folder / file)
    weight_map = read_json(index).get("weight_map") if isinstance(read_json(index), dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
    tensors = TensorFiles(*(folder / name for name in names))
    for name in sorted(set(weight_map) ^ set(tensors)):
        where = "listed, but in none of the files" if name in weight_map else "in a file, but not listed"
        raise UserError(f"{index}: tensor {name!r} is {where}")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, durable and readable by others, and read it back to be sure.

    `safetensors.numpy.save_file` writes a non-contiguous array (a transposed view) wrong without an error.
    """
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without this key
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o644)  # the library creates the file with mode 0600
    sync(path)
    written = TensorFiles(path)
    for name, tensor in tensors.items():
        if not np.array_equal(tensor.reshape(-1).view(np.uint8), written[name].reshape(-1).view(np.uint8)):
            raise OSError(f"{path}: tensor {name!r} was not written as it is in memory")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file in memory. Raises UserError if there is no such file or it is damaged."""
    return {name: np.array(tensor) for name, tensor in TensorFiles(path).items()}


def sync(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
