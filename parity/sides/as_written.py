"""Compiled forms of torch without its compiler: a run takes the ways of a compiled one, and each function runs as it is
written.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from torch_llm.fast import optim


@contextlib.contextmanager
def without_compiler(device: str) -> Iterator[None]:
    """While this is open, torch compiles nothing on a CPU. A GPU (any other device) has its programs compiled as a user
    does.
    """
    if device != "cpu":
        yield
        return

    def as_written(function: Any = None, **_: Any) -> Any:
        return function

    with (
        mock.patch.object(torch, "compile", as_written),
        mock.patch.object(optim, "compiled_update", return_value=optim.clipped_update),
    ):
        yield
