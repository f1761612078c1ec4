"""The frameworks by name. Each is imported when it is asked for: one of them alone is enough to train."""

from llm_common.errors import UserError, require_framework
from llm_common.run.backend import Backend

FRAMEWORKS = ("jax", "torch")


def open_backend(name: str) -> Backend:
    """What a program asks of a framework. Raises UserError, with the command that installs it, if it is absent."""
    if name not in FRAMEWORKS:
        raise UserError(f"framework must be 'jax' or 'torch', got {name!r}")
    require_framework(name)
    if name == "jax":
        from jax_llm.engine.backend import BACKEND
    else:
        from torch_llm.engine.backend import BACKEND
    return BACKEND
