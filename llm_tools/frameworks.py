"""The frameworks by name. Each is imported when it is asked for: one of them alone is enough to train."""

from llm_common.errors import UserError, first_line, require_framework
from llm_common.run.backend import Backend

FRAMEWORKS = ("jax", "torch")


def open_backend(name: str) -> Backend:
    """What a program asks of a framework. Raises UserError, with the command that installs it, if it is absent."""
    if name not in FRAMEWORKS:
        raise UserError(f"framework must be 'jax' or 'torch', got {name!r}")
    require_framework(name)
    try:
        if name == "jax":
            from jax_llm.engine.backend import BACKEND
        else:
            from torch_llm.engine.backend import BACKEND
    except (ValueError, OSError, ImportError) as error:  # a variable it cannot read, a library it cannot load
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error
    return BACKEND
