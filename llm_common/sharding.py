"""How weights are cut over a mesh of devices: one table by canonical name, read by both frameworks.

A mesh has three axes:

    data    replicas: each has all weights and its rows of the batch
    fsdp    each device keeps a part of every weight, gathers the rest when needed, and has its rows of the batch
    tensor  each device keeps and uses a part of every matrix: some heads, some channels of the MLP, some token ids

The batch is cut over data and fsdp together. Devices are numbered with `tensor` running fastest, so that it lies within
a host.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from llm_common.config import ModelConfig, Recipe
from llm_common.errors import UserError
from llm_common.tensors import tensor_shapes

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Which mesh axis cuts which axis of a weight, by the end of its name. Matrices are (out, in). `tensor` cuts what a
# matrix makes for the next one to sum over: the outputs of q, k, v, gate and up, the inputs of o and down, the ids of
# the vocabulary.
RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "embed_tokens.weight": (("tensor",), ("fsdp",)),  # (V, D)
    "lm_head.weight": (("tensor",), ("fsdp",)),  # (V, D)
    "q_proj.weight": (("tensor",), ("fsdp",)),  # (N H, D)
    "k_proj.weight": (("tensor",), ("fsdp",)),  # (K H, D)
    "v_proj.weight": (("tensor",), ("fsdp",)),
    "q_proj.bias": (("tensor", "fsdp"),),  # (N H,), cut by tensor first
    "k_proj.bias": (("tensor", "fsdp"),),
    "v_proj.bias": (("tensor", "fsdp"),),
    "o_proj.weight": (("fsdp",), ("tensor",)),  # (D, N H)
    "gate_proj.weight": (("tensor",), ("fsdp",)),  # (F, D)
    "up_proj.weight": (("tensor",), ("fsdp",)),
    "down_proj.weight": (("fsdp",), ("tensor",)),  # (D, F)
    "norm.weight": (("fsdp",),),  # every norm: (D,), or (H,) of a head
}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(f"mesh: {axis} = {size!r} must be an integer of at least 1")

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """The mesh that a text like "data=2,fsdp=4,tensor=2" describes; axes left out are 1."""
        sizes: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            axis, _, size = part.partition("=")
            if axis not in AXES or not size.isdecimal():
                raise UserError(f"`mesh` {text}: {part!r} is not AXIS=NUMBER with one of the axes {', '.join(AXES)}")
            if axis in sizes:
                raise UserError(f"`mesh` {text}: {axis} is there twice")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in asdict(self).items())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Devices along data, fsdp and tensor."""
        return self.data, self.fsdp, self.tensor

    @property
    def size(self) -> int:
        """How many devices it takes."""
        return math.prod(self.shape)

    @property
    def batch_shards(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return self.data * self.fsdp

    def coordinates(self, device: int) -> dict[str, int]:
        """Where a device lies on each axis."""
        rest, tensor = divmod(device, self.tensor)
        data, fsdp = divmod(rest, self.fsdp)
        return {"data": data, "fsdp": fsdp, "tensor": tensor}

    def batch_shard(self, device: int) -> int:
        """Which part of a batch's rows is a device's."""
        return device // self.tensor


ONE_DEVICE = MeshConfig()


def weight_axes(name: str) -> tuple[tuple[str, ...], ...]:
    """For each axis of a canonical tensor, the mesh axes that cut it, the coarsest cut first."""
    for ending, axes in RULES.items():
        if name.endswith(ending):
            return axes
    raise KeyError(f"no sharding rule for {name!r}")


def sharded_axis(axis: str, name: str) -> int | None:
    """Which axis of a canonical tensor a mesh axis cuts, or None."""
    return next((i for i, cut in enumerate(weight_axes(name)) if axis in cut), None)


def shard_of(name: str, shape: tuple[int, ...], mesh: MeshConfig, at: Mapping[str, int]) -> tuple[slice, ...]:
    """The part of a canonical tensor that the device at these coordinates keeps."""
    sizes = asdict(mesh)
    slices = []
    for length, axes in zip(shape, weight_axes(name), strict=True):
        start, size = 0, length
        for axis in axes:
            size //= sizes[axis]
            start += at[axis] * size
        slices.append(slice(start, start + size))
    return tuple(slices)


def check_mesh(mesh: MeshConfig, cfg: ModelConfig, batch_size: int | None = None, accumulation_steps: int = 1) -> None:
    """Raise UserError, naming the number and the axis, unless a mesh divides the model, and the batch if one is
    given.
    """
    sizes = asdict(mesh)

    def divides(axes: tuple[str, ...], what: str, number: int, advice: str) -> None:
        size = math.prod(sizes[axis] for axis in axes)
        if number % size:
            cut = " x ".join(f"{axis} = {sizes[axis]}" for axis in axes)
            raise UserError(f"`mesh` {mesh}: {cut} does not divide {what} = {number}; {advice}")

    smaller = "take a smaller axis"
    divides(("tensor",), "num_key_value_heads", cfg.num_key_value_heads, smaller)  # and with them all heads
    divides(("tensor",), "vocab_size", cfg.vocab_size, smaller + ", or pad the vocabulary")
    divides(("tensor",), "intermediate_size", cfg.intermediate_size, smaller)
    for name, shape in tensor_shapes(cfg).items():
        for i, (length, axes) in enumerate(zip(shape, weight_axes(name), strict=True)):
            divides(axes, f"axis {i} of {name}", length, smaller)
    if batch_size is not None:
        micro_batch = batch_size // accumulation_steps
        what = "batch_size" if accumulation_steps == 1 else "batch_size / gradient_accumulation_steps"
        divides(BATCH_AXES, what, micro_batch, "take another `batch_size` or a smaller axis")


def check_devices(mesh: MeshConfig, present: int, kind: str, hint: str) -> None:
    """Raise UserError unless a mesh takes exactly the devices (or processes: the `kind`) that are present."""
    if mesh.size != present:
        raise UserError(f"`mesh` {mesh} takes {mesh.size} {kind}s, present: {present}; {hint}")


def check_sharded(mesh: MeshConfig, recipe: Recipe) -> None:
    """`check_mesh` for a training run."""
    train, execution = recipe.train, recipe.execution
    if train.document_separator is not None and execution.attention_backend == "splash":
        raise UserError(
            "attention_backend = 'splash' hides no documents from each other; use 'auto' with document_separator"
        )
    if execution.loss_chunks > 1:
        raise UserError(
            f"loss_chunks = {execution.loss_chunks} is for one device: with a mesh use 1, and remat or tensor"
        )
    check_mesh(mesh, recipe.model, train.batch_size, execution.gradient_accumulation_steps)
