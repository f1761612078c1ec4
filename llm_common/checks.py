"""How the dataclasses of `config` check their values: one message, with the field, the value and what would be
right.
"""

import dataclasses
import math
from typing import Any

from llm_common.errors import UserError, nearest


def check(ok: bool, config: Any, field: str, rule: str) -> None:
    if not ok:
        value = repr(getattr(config, field))
        value = value if len(value) <= 200 else f"{value[:200]}..."
        raise UserError(f"{type(config).__name__}.{field} = {value}: {rule}")


def is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def from_dict(cls, values: dict[str, Any]):
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        meant = nearest(unknown[0], known)
        raise UserError(f"{cls.__name__}: unknown key {unknown[0]!r}{meant}; known keys: {', '.join(sorted(known))}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{cls.__name__}: missing key {missing[0]!r}")
    return cls(**values)
