"""A model as a Hugging Face folder, in the dtype and the file sizes that are asked for."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import UserError, json_bytes, notice
from llm_common.files.tensor_files import (
    INDEX_FILE,
    MODEL_FILE,
    SHARD_BYTES,
    TensorFiles,
    check_finite,
    plan_shards,
    shard_index,
    sync,
)
from llm_common.tensors import Tensors, check_tensors, tensor_shapes
from llm_common.text.hf_tokenizer import AnyTokenizer, companions, token_ids
from llm_common.text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def export(
    folder: Path,
    cfg: ModelConfig,
    weights: Tensors,
    tokenizer: AnyTokenizer | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    stops: Iterable[int] = (),
) -> list[str]:
    """Write config.json, the weights and the tokenizer's files to a new folder; returns their names.

    stops: ids at which generation is to end beside the tokenizer's own. Written under a temporary name and renamed when
    complete. Raises UserError for weights that are not finite, or are not in this dtype, and if the disk cannot take
    them.
    """
    check_tensors(cfg, weights, "weights")
    own = tokenizer if isinstance(tokenizer, Tokenizer) and tokenizer.folder is None else None
    if own is not None and cfg.model_type == "qwen2" and (own.pattern, own.normalization) != ("qwen2", "NFC"):
        notice(
            f"{folder}: transformers cuts text for every qwen2 model as Qwen2 does, and gives other ids than this "
            "tokenizer; "
            "bpe.json in the folder is right"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    sizes = {name: int(np.prod(shape)) * SIZES[dtype] for name, shape in tensor_shapes(cfg).items()}
    plan = plan_shards(MODEL_FILE, sizes, shard_bytes=shard_bytes)
    try:
        partial.mkdir(parents=True)
        for file, shard in plan.items():
            _write_shard(partial / file, {name: tensor_shapes(cfg)[name] for name in shard}, weights, dtype)
        stops = list(stops)
        files = {} if tokenizer is None else companions(tokenizer, stops)
        config = (
            cfg.to_hf()
            | ({} if tokenizer is None else token_ids(tokenizer, stops))
            | {"dtype": dtype, "torch_dtype": dtype}
        )
        files = {"config.json": json_bytes(config), **files}
        if len(plan) > 1:
            files[INDEX_FILE] = json_bytes(shard_index(plan, sizes))
        for name, data in files.items():
            (partial / name).write_bytes(data)
        for path in partial.iterdir():
            sync(path)
        os.rename(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error})") from None
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return list(plan) + sorted(files)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], weights: Tensors, dtype: str) -> None:
    """A safetensors file, tensor by tensor: the library writes bfloat16 only from a framework's tensors, all in memory.

    The library then opens the file, and with it checks every name, type and place.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": STORED[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = weights[name]
            check_finite(name, tensor)
            file.write(_bytes(name, tensor, dtype))
    TensorFiles(path)


def _bytes(name: str, x: np.ndarray, dtype: str) -> bytes:
    """A tensor in a dtype, rounded to nearest even, little-endian. Raises UserError for a number that it cannot
    hold.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(x, np.dtype(dtype))
        _check_range(name, x, np.isfinite(stored), dtype)
        return stored.tobytes()
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    _check_range(name, x, (rounded & np.uint32(0x7F80)) != np.uint32(0x7F80), dtype)
    return rounded.astype(np.uint16).tobytes()


def _check_range(name: str, x: np.ndarray, holds: np.ndarray, dtype: str) -> None:
    if not holds.all():
        at = np.unravel_index(int((~holds).argmax()), x.shape)
        raise UserError(
            f"tensor {name!r}: {x[at]:g} at {[int(i) for i in at]} is not in the range of {dtype}, where it would be "
            "infinite; "
            f"export as {'bfloat16 or ' if dtype == 'float16' else ''}float32"
        )
