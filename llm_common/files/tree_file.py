"""One safetensors file with named arrays and, in its header, JSON: a checkpoint of anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from llm_common.errors import Damaged, UserError, write_whole

KIND = "one-model tree"


def write_tree(path: Path, arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Write arrays and JSON so that the file is there whole, or as it was before. Raises UserError if it cannot be."""
    try:
        metadata = {"format": KIND, "values": json.dumps(values, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the values beside the tensors must be JSON ({error})") from None
    try:
        content = save({name: np.array(x, order="C") for name, x in arrays.items()}, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    write_whole(path, content)


def read_tree(path: Path, like: Mapping[str, np.ndarray] | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the JSON of a file. like: names, shapes and dtypes that are expected; None: any.

    Raises UserError for a file that is missing, of another kind, damaged, or that holds other arrays.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="np") as file:  # pyright: ignore[reportAttributeAccessIssue]
            metadata = file.metadata() or {}
            if metadata.get("format") != KIND:
                raise UserError(f"{path}: not a file of save_tree or save_state; load weights with safetensors")
            values = json.loads(metadata["values"])
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged ({error})") from None
    if like is not None:
        if missing := sorted(set(like) ^ set(arrays)):
            where = "is not in the file" if missing[0] in like else "is in the file alone"
            raise UserError(f"{path}: {missing[0]} {where}; the tree must have the structure of the one that was saved")
        for name, x in like.items():
            found = arrays[name]
            if (found.shape, found.dtype) != (x.shape, x.dtype):
                raise UserError(f"{path}: {name} is {found.dtype} {found.shape}, expected {x.dtype} {x.shape}")
    return arrays, values
