"""What the checks are run on: a config, shapes, a seed, dtypes and a device."""

import dataclasses

from llm_common.config import DTYPES, ModelConfig, check_length, preset
from llm_common.errors import UserError
from parity.core.compare import JAX, TORCH
from parity.sides.jax_side import JaxSide
from parity.sides.torch_side import TorchSide


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
    updates: tuple[int, ...] = (1, 3, 100)  # after how many AdamW steps the weights are compared
    noise: bool = True  # measure each framework's own noise beside the figures
    compile: bool = False  # torch.compile as one of the noise controls: half a minute
    seeds: int = 16  # pooled in float32 and bfloat16
    quick: bool = False  # a part of the cases that cover pairs of settings
    full: bool = False  # all values of every setting in them
    blamed_only: bool = False  # trace a row that fails on the side that it blames alone: twice as fast
    device: str = "cpu"  # of both frameworks; the specification is NumPy
    # "auto": each framework's fastest kernel for the device, reference in float64; "fused": not in float64
    attention: str = "reference"
    only: str = ""  # the framework that takes both sides, to see whether it raises, too

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        for field in ("batch", "length", "steps", "tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.attention not in ("reference", "auto", "fused"):
            raise UserError(f"attention = {self.attention!r} must be 'reference', 'auto' or 'fused'")
        check_length(self.cfg, self.length, "length")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} must lie in [0, 2^32)")

    def device_name(self) -> str:
        """What the device calls itself. Raises UserError if a framework cannot use it."""
        jax_side, _ = self.sides("float32")
        return jax_side.device.device_kind

    def on(self, device: str, attention: str) -> "Settings":
        """The same on another device."""
        return dataclasses.replace(self, device=device, attention=attention)

    def sides(self, dtype: str, cfg: ModelConfig | None = None) -> tuple[JaxSide, TorchSide]:
        """The two frameworks behind one interface, for this config or another."""
        kinds = {"": (JaxSide, TorchSide), JAX: (JaxSide, JaxSide), TORCH: (TorchSide, TorchSide)}[self.only]
        return tuple(side(cfg or self.cfg, dtype, self.device, self.attention) for side in kinds)  # type: ignore[return-value]
