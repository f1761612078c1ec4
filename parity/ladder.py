"""The ladder: all checks in order, from initial weights to sampled tokens."""

import dataclasses
import time
from collections.abc import Callable, Iterator

from llm_common.config import DTYPES, ModelConfig, check_length, preset
from llm_common.errors import UserError
from parity.compare import Row
from parity.jax_side import JaxSide
from parity.model_checks import check_cache, check_gradients, check_init, check_logits, check_spec
from parity.precision_checks import check_precision
from parity.token_checks import check_tokens
from parity.torch_side import TorchSide
from parity.training_checks import check_adamw, check_library, check_trajectory


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the checks are run on."""

    cfg: ModelConfig = dataclasses.field(default_factory=lambda: preset("tiny"))
    seed: int = 0
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    batch: int = 3
    length: int = 13  # positions in a training or test sequence
    steps: int = 1000  # of a trajectory
    tokens: int = 4000  # draws in float32
    device: str = "cpu"  # of both frameworks; the specification is NumPy
    attention: str = "reference"  # "auto": each framework's fastest kernel for the device, reference in float64

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        for field in ("batch", "length", "steps", "tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.attention not in ("reference", "auto"):
            raise UserError(f"attention = {self.attention!r} must be 'reference' or 'auto'")
        check_length(self.cfg, self.length, "length")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} must lie in [0, 2^32)")

    def device_name(self) -> str:
        """What the device calls itself. Raises UserError if a framework cannot use it."""
        jax_side, _ = self.sides("float32")
        return jax_side.device.device_kind

    def sides(self, dtype: str, cfg: ModelConfig | None = None) -> tuple[JaxSide, TorchSide]:
        """The two frameworks behind one interface, for this config or another."""
        return tuple(side(cfg or self.cfg, dtype, self.device, self.attention) for side in (JaxSide, TorchSide))  # type: ignore[return-value]


CHECKS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "spec": check_spec,
    "init": check_init,
    "logits": check_logits,
    "gradients": check_gradients,
    "precision": check_precision,
    "adamw": check_adamw,
    "library": check_library,
    "trajectory": check_trajectory,
    "cache": check_cache,
    "tokens": check_tokens,
}


def run_checks(
    settings: Settings, names: tuple[str, ...] = (), on_check: Callable[[str, list[Row], float], None] | None = None
) -> list[Row]:
    """All rows of the named checks (none named: all). `on_check` is told each check's rows and seconds as they come.

    A check that raises is a failed row with the error in it, not the end of the ladder.
    """
    for name in names:
        if name not in CHECKS:
            raise UserError(f"unknown check {name!r}; known: {', '.join(CHECKS)}")
    rows: list[Row] = []
    for name in names or tuple(CHECKS):
        start = time.perf_counter()
        try:
            found = list(CHECKS[name](settings))
        except UserError:
            raise
        except Exception as error:  # whatever a broken side raises is a finding
            found = [_crash(name, error)]
        rows += found
        if on_check is not None:
            on_check(name, found, time.perf_counter() - start)
    return rows


def _crash(check: str, error: Exception) -> Row:
    """A row for an exception; the side is the one whose package the traceback ends in."""
    side, frame = "", error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_globals.get("__name__", "")
        for prefix, name in (("jax_llm", "JAX"), ("torch_llm", "torch"), ("llm_common", "shared code")):
            side = name if module.startswith(prefix) else side
        frame = frame.tb_next
    note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Row(check, "raised an error", "", float("nan"), 0, False, side or "the check itself", note)
