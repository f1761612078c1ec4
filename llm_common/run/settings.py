"""What a checkpoint records of the run that made it, and whether two runs are one."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llm_common.config import ExecutionConfig, Recipe
from llm_common.data.datasets import Dataset
from llm_common.errors import UserError, canonical_json
from llm_common.text.hf_tokenizer import AnyTokenizer

COMPARED = ("train", "optimizer", "data", "initial")  # parts of the settings that make a run the run that it is
# settings that change no result, or only its rounding: a run may go on with others
MAY_CHANGE = (*(field.name for field in fields(ExecutionConfig)), "max_skipped_steps")


def run_settings(recipe: Recipe, dataset: Dataset, tokenizer: AnyTokenizer | None = None) -> dict[str, Any]:
    """What a checkpoint records of its run, as JSON. Raises UserError if the dataset was made for other settings."""
    data, train = dataset.fingerprint(), recipe.train
    for field in ("seq_len", "batch_size", "seed"):
        if data.get(field, getattr(train, field)) != getattr(train, field):
            raise UserError(
                f"the dataset has {field} = {data[field]}, but TrainConfig.{field} = {getattr(train, field)}"
            )
    if tokenizer is not None:
        data["tokenizer"] = tokenizer.fingerprint()
    return {"train": recipe.settings(), "optimizer": asdict(recipe.optimizer), "data": data}


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The settings that make two runs different, each in words: the framework, what `MAY_CHANGE` lists, and how many
    steps there are to be in all, do not.
    """
    found = []
    for part in COMPARED:
        before = saved.get(part)
        for key, value in json.loads(canonical_json(asked.get(part, {}))).items():
            old = before.get(key) if isinstance(before, dict) else None
            if old != value and key not in MAY_CHANGE and key != "total_steps":
                found.append(_in_words(part, key, old, value))
    return found


def _in_words(part: str, key: str, old: Any, new: Any) -> str:
    """One difference, by the field that a person sets."""
    if part == "data" and key in ("sha256", "tokens", "manifest"):
        return f"`data` has other tokens ({key} {str(old)[:12]} here, {str(new)[:12]} asked for)"
    if part == "data" and key == "tokenizer":
        return "`tokenizer` is another"
    if part == "initial":
        return f"`init_from` has other weights ({key})"
    return f"`{key}` = {old!r} here, {new!r} asked for"


def well_formed_settings(settings: Any) -> bool:
    """Whether settings have the form that a run gives them."""
    if not isinstance(settings, dict):
        return False
    parts = all(isinstance(settings.get(part, {}), dict) for part in (*COMPARED, "roles", "evaluation"))
    segments = settings.get("segments", [])
    return parts and isinstance(segments, list) and all(isinstance(x, dict) for x in segments)


def total_steps(settings: dict[str, Any]) -> Any:
    """How many steps a run is to have, as its settings say."""
    optimizer = settings.get("optimizer")
    return optimizer.get("total_steps") if isinstance(optimizer, dict) else None


def check_resumable(folder: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UserError, naming every differing field, unless a run may go on from the checkpoint `folder`.

    What `differences` lists would silently be another run. More steps extend a run; fewer would not be what it was.
    """
    differing = differences(saved, asked)
    old, new = (total_steps(x) for x in (saved, asked))
    if isinstance(old, int) and isinstance(new, int) and new < old:
        differing.append(f"`total_steps` = {old} here, {new} asked for: a run may become longer, not shorter")
    if differing:
        raise UserError(f"{folder}: the run was started with other settings: {'; '.join(differing)}; use another `out`")


def trained_ends(settings: dict[str, Any]) -> list[int]:
    """The ids that a run's data ended documents and answers with: generation must stop there."""
    roles = settings.get("roles")
    found = [roles.get(name) for name in ("turn_end", "document_end")] if isinstance(roles, dict) else []
    return [x for x in found if isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31]
