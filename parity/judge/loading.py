"""Models and inputs that a command line names: `port.py:make`, `package.module:make`, `transformers:FOLDER`, `.npz`."""

import importlib
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError, first_line, require_package


def load_model(text: str) -> Any:
    """What `judge` takes as a side. Of `FILE.py:NAME` or `MODULE:NAME` the name is called if it is a function without
    arguments; of `transformers:FOLDER` the model is loaded from its files. Raises UserError, with the line of the file
    that is to blame.
    """
    where, colon, name = text.rpartition(":")
    if where == "transformers":
        return _of_transformers(Path(name))
    if not colon or not where or not name:
        raise UserError(f"{text}: FILE.py:NAME, MODULE:NAME or transformers:FOLDER is needed")
    names = _run(Path(where)) if where.endswith(".py") else _import(where)
    if name not in names:
        made = [x for x in names if not x.startswith("_")]
        raise UserError(f"{text}: {where} has no {name!r}; it has {', '.join(made[:12])}")
    found = names[name]
    if not callable(found) or hasattr(found, "parameters") or hasattr(found, "apply") or isinstance(found, tuple):
        return found
    try:
        return found()
    except Exception as error:  # whatever somebody's code raises
        raise UserError(f"{text}: {_place(where, error)}{type(error).__name__}: {first_line(error)}") from error


def load_inputs(path: Path) -> Any:
    """Inputs of an .npy file, or an .npz archive: arrays with names are keywords, those named 0, 1, ... or arr_0, ...
    positional. Raises UserError; no pickle is read.
    """
    if not path.is_file():
        raise UserError(f"--inputs {path}: {'a folder' if path.is_dir() else 'no such file'}; .npy or .npz is needed")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return [found]
        arrays = {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(f"--inputs {path}: not an array or an archive of arrays ({first_line(error)})") from None
    if not arrays:
        raise UserError(f"--inputs {path}: holds no array")
    numbered = {name: re.fullmatch(r"(?:arr_)?(\d+)", name) for name in arrays}
    places = sorted((int(match[1]), name) for name, match in numbered.items() if match)
    return [arrays[name] for _, name in places], {name: x for name, x in arrays.items() if not numbered[name]}


def _run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # what stands beside a script can be imported by it
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # whatever somebody's code raises
        raise UserError(f"{_place(str(path), error)}{type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)


def _import(name: str) -> dict[str, Any]:
    try:
        return vars(importlib.import_module(name))
    except Exception as error:  # whatever somebody's code raises
        raise UserError(f"{name}: cannot be imported ({type(error).__name__}: {first_line(error)})") from error


def _of_transformers(folder: Path) -> Any:
    require_package("transformers", "dev")
    import transformers

    if not folder.is_dir():
        raise UserError(f"transformers:{folder}: no such folder")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    cls: Any = getattr(transformers, names[0], None) if names else None
    return (cls or transformers.AutoModel).from_pretrained(folder).eval()


def _place(where: str, error: BaseException) -> str:
    frames = [x for x in traceback.extract_tb(error.__traceback__) if Path(x.filename).name == Path(where).name]
    return f"{where}, line {frames[-1].lineno}: " if frames else f"{where}: "
