"""Torch's distributed checkpoints (DCP): a flat tree of canonical tensors. Nothing in them is executed.

here                                         jax_llm.engine.foreign_checkpoint
torch's distributed checkpoint (DCP)         Orbax
"""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from llm_common.errors import UserError, first_line
from llm_common.files.dcp_metadata import StoredTensor, read_metadata
from llm_common.tensors import check_like


def write(path: Path, tree: dict[str, np.ndarray]) -> None:
    """Write arrays by name to a folder that is not there yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is one process, which is what we ask for
        save({name: torch.from_numpy(x) for name, x in tree.items()}, checkpoint_id=path, no_dist=True)


def read(path: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a folder, which must have the names, shapes and dtypes of `like`. Raises UserError, naming what is
    wrong.
    """
    found = read_metadata(path)
    check_like(
        path,
        {name: (x.shape, x.dtype) for name, x in found.items()},
        {name: (x.shape, x.dtype.name) for name, x in like.items()},
    )
    return {name: _read_stored(path, name, stored) for name, stored in found.items()}


def _read_stored(path: Path, name: str, stored: StoredTensor) -> np.ndarray:
    """A tensor out of the files of a DCP folder. Every piece is a zip archive, whose CRCs torch itself does not
    compare.
    """
    out, there = np.zeros(stored.shape, stored.dtype), np.zeros(stored.shape, bool)
    for chunk in stored.chunks:
        try:
            with (path / chunk.file).open("rb") as file:
                file.seek(chunk.offset)
                content = file.read(chunk.length)
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("a piece is compressed")
                damaged = archive.testzip()
                if damaged is not None:
                    raise ValueError(f"the CRC of {damaged} is another")
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            if tuple(tensor.shape) != chunk.sizes or str(tensor.dtype) != f"torch.{stored.dtype}" or there[box].any():
                raise ValueError(f"a piece is {tensor.dtype} {tuple(tensor.shape)}, not what the metadata says")
            out[box], there[box] = tensor.numpy(), True
        except Exception as error:  # of a damaged file torch raises anything
            raise UserError(f"{path / chunk.file}: tensor {name!r} cannot be read ({first_line(error)})") from None
    if not there.all():
        raise UserError(f"{path}: of tensor {name!r} some pieces are missing")
    return out
