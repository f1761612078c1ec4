import pytest

from parity.sides.jax_side import clear_caches


@pytest.fixture
def fresh():
    """Compiled JAX programs are forgotten before and after, so that a planted bug is traced and then gone again."""
    clear_caches()
    yield
    clear_caches()
