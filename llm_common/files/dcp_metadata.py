"""What the `.metadata` of a torch distributed checkpoint (DCP) says, read without running what is in it.

The file is a pickle, which can name any function to be called. This reader knows the few names that DCP writes, and
stands plain records in for all of them; any other name is refused. Nothing of torch is imported, and nothing of the
file is executed.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, read_small

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes are: a file of the folder, from `offset` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # as torch calls it, "float32"
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class _Record:
    """Stands for an object of DCP's: it keeps what the pickle says of it."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Index(_Record):
    pass


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


class _Name(str):
    """A name that the pickle mentions, a dtype for instance."""


def _nothing(*args: Any) -> None:
    """Stands for functions whose result nobody reads."""


_DTYPES = {f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)} | {"bfloat16", "bool"}
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch.serialization", "_get_layout"): _nothing,
    ("collections", "OrderedDict"): dict,
    **{("pathlib", name): _nothing for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")},
    **{("pathlib._local", name): _nothing for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")},
    **{("torch", name): _Name(name) for name in _DTYPES},
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Tensor,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Bytes,
    **{
        ("torch.distributed.checkpoint.metadata", name): _Record
        for name in ("Metadata", "TensorProperties", "ChunkStorageMetadata", "StorageMeta")
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
}


class _Reader(pickle._Unpickler):  # pyright: ignore: the one in Python, whose memory follows the file's size and not its claims
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module[:60]}.{name[:60]}, which no checkpoint needs")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside itself")


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a DCP folder by name. Raises UserError, naming what is wrong, for whatever is not such a file."""
    path = folder / METADATA
    content = read_small(path, "is this a DCP folder?")
    try:
        metadata = _Reader(io.BytesIO(content)).load()
        places: dict[str, list[tuple[_Index, _Record]]] = {}
        for index, info in metadata["storage_data"].items():
            places.setdefault(index["fqn"], []).append((index, info))
        found = {}
        for name, tensor in metadata["state_dict_metadata"].items():
            if isinstance(tensor, _Tensor):
                found[name] = _stored(path, name, tensor, places.get(name, []))
        return found
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the metadata of a DCP checkpoint ({type(error).__name__}: {words})") from None


def _stored(path: Path, name: str, tensor: _Tensor, places: list[tuple[_Index, _Record]]) -> StoredTensor:
    properties = tensor["properties"]
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties["dtype"]
    shape, boxes = _sizes(tensor["size"]), [(_sizes(x["offsets"]), _sizes(x["sizes"])) for x in tensor["chunks"]]
    chunks = []
    for index, info in places:
        offsets = _sizes(index["offset"]) if index["offset"] is not None else (0,) * len(shape)
        sizes = [size for at, size in boxes if at == offsets]
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if not isinstance(file, str) or Path(file).name != file or not isinstance(name, str):
            raise UserError(f"{path}: {str(file)[:100]!r} is not the name of a file in this folder")
        if info["transform_descriptors"]:
            raise UserError(f"{path}: tensor {name[:100]!r} is compressed, which is not read")
        if len(sizes) != 1 or not all(isinstance(x, int) and x >= 0 for x in (offset, length)):
            raise UserError(f"{path}: a piece of tensor {name[:100]!r} has no place")
        chunks.append(Chunk(offsets, sizes[0], file, offset, length))
    if not isinstance(dtype, _Name) or len(chunks) != len(boxes):
        raise UserError(f"{path}: tensor {name[:100]!r} is incomplete")
    return StoredTensor(str(dtype), shape, tuple(chunks))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(x, int) and 0 <= x < 2**48 for x in value):
        raise UserError("a size that is none")
    return tuple(value)
