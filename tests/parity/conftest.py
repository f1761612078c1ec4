import runpy
import sys
from pathlib import Path

import pytest

from parity.sides.jax_side import clear_caches

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script by name with flags; returns exit code, output and error output."""

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.syspath_prepend(str(SCRIPTS))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def fresh():
    """Compiled JAX programs are forgotten before and after, so that a planted bug is traced and then gone again."""
    clear_caches()
    yield
    clear_caches()
