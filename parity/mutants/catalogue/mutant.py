"""How a planted bug is written down: the edits, and the check, the side and the place it must go red at.

`jax`, `torch`: one side is wrong. `both`: both sides alike. `shared`: the code that both use. Of the last two only the
specification can tell. At the end stands what is equal by mathematics and must stay green.
"""

from dataclasses import dataclass

from parity.core.compare import JAX, SHARED, TORCH
from parity.core.planting import Edit


@dataclass(frozen=True)
class Mutant:
    name: str
    area: str
    edits: tuple[Edit, ...]
    check: str  # whose row must be the first to go red
    side: str
    place: str = ""  # the module, tensor or function that must be named; empty if there is none
    dtype: str = "float64"
    runs: str = ""  # the check to run, if its rows have another name
    quick: bool = False  # part of the subset for every test run
    equivalent: bool = False


MUTANTS: list[Mutant] = []
EQUIVALENTS: list[Mutant] = []
_AREA = [""]


def area(name: str) -> None:
    _AREA[0] = name


def _add(name: str, edits: list[Edit], check: str, side: str, place: str, **more) -> None:
    MUTANTS.append(Mutant(name, _AREA[0], tuple(edits), check, side, place, **more))


def jax(name, target, old, new, check="logits", place="", **more) -> None:
    _add(name, [Edit(f"jax_llm.{target}", old, new)], check, JAX, place, **more)


def torch(name, target, old, new, check="logits", place="", **more) -> None:
    _add(name, [Edit(f"torch_llm.{target}", old, new)], check, TORCH, place, **more)


def both(name, of_jax, of_torch, check="logits", place="", **more) -> None:
    """of_jax, of_torch: target, old and new of each side."""
    edits = [Edit(f"jax_llm.{of_jax[0]}", *of_jax[1:]), Edit(f"torch_llm.{of_torch[0]}", *of_torch[1:])]
    _add(name, edits, check, more.pop("side", SHARED), place, **more)


def same_edit(name, target, old, new, check="logits", place="", **more) -> None:
    """The same edit on both sides, written once: `xp` stands for jnp or torch, `axis` for axis or dim."""
    words = (("jax_llm", "jnp", "axis"), ("torch_llm", "torch", "dim"))
    edits = [
        Edit(
            f"{package}.{target}", *(text.replace("xp.", f"{xp}.").replace("axis=", f"{axis}=") for text in (old, new))
        )
        for package, xp, axis in words
    ]
    _add(name, edits, check, more.pop("side", SHARED), place, **more)


def shared(name, target, old, new, check, place="", **more) -> None:
    _add(name, [Edit(f"llm_common.{target}", old, new)], check, more.pop("side", SHARED), place, **more)


def equivalent(name: str, *edits: tuple[str, str, str], check: str = "model") -> None:
    """check: which group of checks must stay green."""
    EQUIVALENTS.append(Mutant(name, "equal by mathematics", tuple(Edit(*e) for e in edits), check, "", equivalent=True))


LAYER = "model.layers.0"
LAST = "model.layers.1"
ATTENTION = f"{LAYER}.self_attn"
