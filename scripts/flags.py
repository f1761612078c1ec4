"""Command-line flags made from the config dataclasses, so that a setting is written down once."""

import argparse
import dataclasses
import types
import typing
from typing import Any


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One `--field-name` for every field of a dataclass, with its default."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_parser_of(hints[field.name]),
            default=default,
            metavar=getattr(hints[field.name], "__name__", "number or 'none'").upper(),
            help=f"default: {default}",
        )


def from_flags(cls: type, args: argparse.Namespace) -> Any:
    """The dataclass from parsed flags; its own validation names a wrong field and value."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _parser_of(hint: Any) -> typing.Callable[[str], Any]:
    if isinstance(hint, types.UnionType):  # float | None
        (inner,) = (x for x in typing.get_args(hint) if x is not types.NoneType)
        return lambda text: None if text.lower() == "none" else inner(text)
    return hint
