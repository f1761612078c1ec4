"""A parser of command lines whose errors are one line with the fix: a mistyped flag is answered with its right name,
not with a page of usage.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from llm_common.errors import UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises UserError where argparse prints its usage and ends the process."""

    may_be_empty = ("--prompt",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._explained(message)} ({self.prog} --help lists all)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        for before, value in itertools.pairwise(given):
            if before.startswith("--") and value == "" and before not in self.may_be_empty:
                raise UserError(f"{before} is empty: give a value, or leave the flag out")
        for value in given:
            if re.fullmatch(r"--[\w-]+=", value) and value[:-1] not in self.may_be_empty:
                raise UserError(f"{value[:-1]} is empty: give a value, or leave the flag out")
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            self.error(self._unknown(left))
        return parsed

    def _unknown(self, left: Sequence[str]) -> str:
        """What is said of arguments that no flag takes: the first is the mistake, the others may be its values."""
        flag = left[0].partition("=")[0]
        if not flag.startswith("-"):
            return f"nothing takes {left[0]!r}"
        return f"there is no flag {flag}{nearest(flag, self._flags())}"

    def _flags(self) -> list[str]:
        """The flags of this parser, and of the commands below it that were not chosen: a flag may belong to one."""
        found = dict.fromkeys(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    found |= dict.fromkeys(below._option_string_actions)
        return list(found)

    def _explained(self, message: str) -> str:
        """argparse's message in words that name the flag first, and the nearest of the known values."""
        if choice := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            name, given, known = choice.groups()
            choices = [x.strip().strip("'\"") for x in known.split(",")]
            what = f"{_last(name)} " if name.startswith("-") else ""
            return f"{what}{given!r} is not known{nearest(given, choices)}; known: {', '.join(choices)}"
        if missing := re.match(r"the following arguments are required: (.*)", message):
            names = [_last(x) for x in missing[1].split(", ")]
            choices = [x for action in self._actions if action.dest in names for x in action.choices or ()]
            what = f": one of {', '.join(map(str, choices))}" if choices else ""
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing{what}"
        if value := re.match(r"argument (\S+): invalid (.*) value: (.*)", message, re.DOTALL):
            kind = {"int": "a whole number", "float": "a number"}.get(value[2], value[2])
            given = value[3].strip("'")
            return f"{_last(value[1])} {given}: {kind} is expected"
        if one_of := re.match(r"one of the arguments (.*) is required", message):
            return f"{one_of[1].replace(' ', ' or ')} is missing"
        if both := re.match(r"argument (\S+): not allowed with argument (\S+)", message):
            return f"{both[1]} and {both[2]}: give one of them"
        return re.sub(r"^argument (\S+): ", r"\1: ", message)


def _last(names: str) -> str:
    """Of the names that argparse has for one flag, as --input/--data, the last."""
    return names.split("/")[-1]
