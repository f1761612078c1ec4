"""safetensors files: written durable and read back, and read lazily through a memory map.

The library validates a file; what it lets pass (duplicate names, names that look like paths) is refused here, and
bfloat16, which NumPy does not have, is turned into float32 here. Format:
https://github.com/huggingface/safetensors#format
"""

import math
import mmap
import os
import stat
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from llm_common.errors import UserError, notice, parse_json, read_json

LARGEST_HEADER = (
    16 << 20
)  # bytes: some hundred thousand tensors; the library's own limit is 100 MB, which take gigabytes to parse
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

    A tensor is a read-only view of the file, or a float32 array if the file holds bfloat16. The files stay open: they
    may be renamed or deleted meanwhile. Raises UserError, by name, for whatever is not a well-formed file of float
    tensors, and, unless that is allowed, for one that is not finite.
    """

    def __init__(self, *paths: Path, finite: bool = True) -> None:
        """finite: whether a tensor that holds NaN or an infinity is refused when it is read for the first time."""
        self.entries: dict[str, Entry] = {}
        self._finite: set[str] | None = set() if finite else None  # those that were looked through
        self.headers: list[bytes] = []
        for path in paths:
            for name, entry in self._open(path):
                if name in self.entries:
                    raise UserError(f"{path}: tensor {name!r} is in another file too")
                self.entries[name] = entry

    def _open(self, path: Path) -> Iterator[tuple[str, Entry]]:
        check_plain_file(path)
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if LARGEST_HEADER < length <= os.fstat(descriptor).st_size:
            raise UserError(f"{path}: a header of {length:,} bytes; at most {LARGEST_HEADER:,} are read")
        try:
            safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({str(error)[:200]})") from None
        header = os.pread(descriptor, length, 8)
        self.headers.append(header)
        content = parse_json(header, f"{path}, header", object_pairs_hook=lambda pairs: _unique(path, pairs))
        for name, value in content.items():
            if name == "__metadata__":
                continue
            if "/" in name or "\\" in name or "\0" in name:
                raise UserError(f"{path}: {name!r} is a path, not the name of a tensor")
            if value["dtype"] not in STORED:
                raise UserError(
                    f"{path}: tensor {name!r} is {value['dtype']}, but weights are floating-point numbers "
                    f"({', '.join(STORED)}); a quantized model must be widened first"
                )
            stored, shape = np.dtype(STORED[value["dtype"]]), tuple(value["shape"])
            start, end = value["data_offsets"]
            if end - start != math.prod(shape) * stored.itemsize or 8 + length + end > os.fstat(descriptor).st_size:
                raise UserError(f"{path}: tensor {name!r} does not fit its shape {shape} or the file")
            dtype = np.dtype(np.float32) if value["dtype"] == "BF16" else stored
            yield name, Entry(descriptor, value["dtype"], dtype, shape, 8 + length + start, end - start)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._read(name)
        if self._finite is not None and name not in self._finite:
            check_finite(name, array)
            self._finite.add(name)
        return array

    def _read(self, name: str) -> np.ndarray:
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

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # a Mapping's own way would read the tensor

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
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise UserError(f"{path}: {name[:200]!r} is there twice")
        names[name] = value
    return names


CHECKED_AT_ONCE = 1 << 22  # numbers, so that there is no temporary of a tensor's size


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise UserError, with the place of the first one, if some of a tensor's numbers are NaN or infinite."""
    flat, piece = array.reshape(-1), CHECKED_AT_ONCE
    for start in range(0, flat.size, piece):
        wrong = ~np.isfinite(flat[start : start + piece])
        if wrong.any():
            at = start + int(wrong.argmax())
            count = sum(int((~np.isfinite(flat[i : i + piece])).sum()) for i in range(start, flat.size, piece))
            place = [int(i) for i in np.unravel_index(at, array.shape)]
            raise UserError(
                f"tensor {name!r} is not finite: {count:,} of {flat.size:,} numbers are NaN or infinite, the first "
                f"({flat[at]}) at {place}; take an earlier checkpoint, or another copy of these weights"
            )


def check_plain_file(path: Path) -> None:
    """Raise UserError unless a path is a plain file or, as in the hub's cache, a link into the `blobs` folder beside
    it.
    """
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
    """Which tensors, of these sizes in bytes, go to which files: in order, at least `least` files, of about
    `shard_bytes` each.

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


def open_model_files(folder: Path, file: str = MODEL_FILE, listed: Collection[str] | None = None) -> TensorFiles:
    """The tensors of a folder: those of `file`, else of the shards that the index beside it (`file`.index.json) lists.

    Where both are there, transformers takes the whole file, and so does this, with a notice. listed: the files of a
    checkpoint, beside which nothing else counts.
    """
    index = folder / f"{file}.index.json"
    whole = (folder / file).exists() if listed is None else file in listed
    if whole and listed is None and index.exists():
        notice(f"{folder}: {file} is read, as by transformers; {index.name} beside it belongs to other files")
    if whole or (not index.is_file() if listed is None else index.name not in listed):
        if not whole and (pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))):
            raise UserError(
                f"{pickles[0]}: a pickle can run code and is not read; save the model with transformers as safetensors"
            )
        return TensorFiles(folder / file)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
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
    written = TensorFiles(path, finite=False)
    for name, tensor in tensors.items():
        if not np.array_equal(tensor.reshape(-1).view(np.uint8), written[name].reshape(-1).view(np.uint8)):
            raise OSError(f"{path}: tensor {name!r} was not written as it is in memory")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file in memory. Raises UserError if there is no such file or it is damaged."""
    return {name: np.array(tensor) for name, tensor in TensorFiles(path).items()}


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and ask the operating system to put it on the disk."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
