"""Checkpoints of Orbax, JAX's own format: a flat tree of canonical tensors.

here           torch_llm.engine.foreign_checkpoint
Orbax          torch's distributed checkpoint (DCP)
"""

import concurrent.futures
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError, first_line, require_package
from llm_common.processes import end_with_parent
from llm_common.tensors import check_like


def write(path: Path, tree: dict[str, np.ndarray]) -> None:
    """Write arrays by name to a folder that is not there yet."""
    require_package("orbax", "jax")
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)


def read(path: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a folder, which must have the names, shapes and dtypes of `like`. Raises UserError, naming what is
    wrong.

    A process of its own reads them: of a damaged folder the library's threads still write to stderr when it has raised.
    """
    require_package("orbax", "jax")
    wanted = {name: (x.shape, x.dtype.name) for name, x in like.items()}
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start) as pool:
        found, error = pool.submit(_read, path, wanted).result()
    if error is not None:
        raise UserError(error)
    return found


def _start() -> None:
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _read(path: Path, like: dict[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, np.ndarray], str | None]:
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            content: Any = checkpointer.metadata(path.resolve())
        tree = getattr(content.item_metadata, "tree", content.item_metadata)
        check_like(path, {name: (tuple(x.shape), np.dtype(x.dtype).name) for name, x in dict(tree).items()}, like)
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(path.resolve())
        return {name: np.asarray(restored[name]) for name in like}, None
    except UserError as error:
        return {}, str(error)
    except Exception as error:  # of a damaged folder the library raises anything
        return {}, f"{path}: not an Orbax checkpoint of these tensors ({first_line(error)})"
