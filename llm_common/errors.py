"""The one exception for what a user can get wrong; scripts print it as a single line and exit with 2."""

import importlib
import importlib.util
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A config, file, flag, text or device that cannot be used. The message names the value and the fix."""


def require_framework(name: str) -> None:
    """Raise UserError unless the packages behind `name` ("jax" or "torch") are installed."""
    for package in {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[name]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; run: pip install '.[{name}]'")


def import_side(framework: str, module: str):
    """The module `jax_llm.<module>` or `torch_llm.<module>`, after checking that its framework is installed."""
    if framework not in ("jax", "torch"):
        raise UserError(f"framework must be 'jax' or 'torch', got {framework!r}")
    require_framework(framework)
    return importlib.import_module(f"{framework}_llm.{module}")


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
