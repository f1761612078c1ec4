"""The ladder: all checks in order, from initial weights to sampled tokens."""

import time
from collections.abc import Callable, Iterator

from llm_common.errors import UserError
from parity.common_checks import (
    check_data,
    check_evaluation,
    check_files,
    check_resume,
    check_schedule,
    check_tokenizer,
)
from parity.compare import Row
from parity.model_checks import check_cache, check_gradients, check_init, check_logits, check_spec
from parity.precision_checks import check_precision
from parity.settings import Settings
from parity.token_checks import check_tokens
from parity.training_checks import check_adamw, check_library, check_trajectory

CHECKS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "spec": check_spec,
    "tokenizer": check_tokenizer,
    "data": check_data,
    "init": check_init,
    "logits": check_logits,
    "gradients": check_gradients,
    "precision": check_precision,
    "schedule": check_schedule,
    "adamw": check_adamw,
    "library": check_library,
    "files": check_files,
    "resume": check_resume,
    "trajectory": check_trajectory,
    "evaluation": check_evaluation,
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
        found = list(rows_of(name, settings))
        rows += found
        if on_check is not None:
            on_check(name, found, time.perf_counter() - start)
    return rows


def rows_of(check: str, settings: Settings) -> Iterator[Row]:
    """The rows of one check as they come; if it raises, the last of them is the error."""
    try:
        yield from CHECKS[check](settings)
    except Exception as error:  # whatever a broken side raises is a finding, and the rows before it stay
        yield _crash(check, error)


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
