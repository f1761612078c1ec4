"""Checkpoints in the formats of Orbax (JAX) and of torch's distributed checkpoints (DCP), to and from the folder of
this project.

    python scripts/convert_checkpoint.py --from runs/first/step-00001000 --to-orbax exported/orbax
    python scripts/convert_checkpoint.py --from runs/first/step-00001000 --to-dcp exported/dcp
    python scripts/convert_checkpoint.py --from-orbax exported/orbax --like runs/first/step-00001000 --to runs/again
    python scripts/convert_checkpoint.py --from-dcp exported/dcp --like runs/first/step-00001000 --to runs/again

Both hold a flat tree of canonical tensors, `weights.<name>`, `mu.<name>` and `nu.<name>`, and the counters `step` and
`adam_count`. The other settings of a run, and its tokenizer, are taken from the folder given as --like. Beside what is
written lies checksums.json; a folder that has it is compared with it, of one that others wrote everything is checked
that the format itself can tell. No pickle is executed: DCP's `.metadata`, which is one, is read by a reader that knows
its few names.
"""

import shutil
from pathlib import Path

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import (
    UserError,
    has_its_checksum,
    json_bytes,
    notice,
    read_json,
    run_main,
    sha256_of,
    with_checksum,
    write_whole,
)
from llm_common.files.tensor_files import check_finite
from llm_common.run.checkpoint import STATE_FILE, TrainingState, load_checkpoint, save_checkpoint
from llm_common.tensors import check_tensors, tensor_shapes
from llm_common.text.hf_tokenizer import load_tokenizer
from llm_tools.flags import make_parser
from llm_tools.frameworks import open_backend

CHECKSUMS = "checksums.json"
PARTS, COUNTERS = ("weights", "mu", "nu"), ("step", "adam_count")


def main() -> None:
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="folder", type=Path, help="a checkpoint folder of this project")
    source.add_argument("--from-orbax", type=Path)
    source.add_argument("--from-dcp", type=Path)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, help="the folder of a run, in which a checkpoint is written")
    target.add_argument("--to-orbax", type=Path)
    target.add_argument("--to-dcp", type=Path)
    parser.add_argument(
        "--like", type=Path, help="a checkpoint of the same run, for what the other formats do not hold"
    )
    args = parser.parse_args()
    out = args.to or args.to_orbax or args.to_dcp
    if args.to is None and out.exists():
        raise UserError(f"{out}: is there already; give another name")
    if args.folder is None and args.like is None:
        raise UserError("--like is missing: the checkpoint whose config, settings and tokenizer are taken")
    like = args.folder or args.like
    cfg, state, settings = load_checkpoint(like)
    if args.folder is None:
        source, framework = (args.from_orbax, "jax") if args.from_orbax else (args.from_dcp, "torch")
        if not source.is_dir():
            raise UserError(f"{source}: no such folder")
        backend = open_backend(framework)
        check_files(source)
        state = to_state(cfg, str(source), backend.read_checkpoint(source, flat(state)))
    if args.to is not None:
        tokenizer = load_tokenizer(like)
        print(save_checkpoint(out, cfg, state, settings, tokenizer))
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    open_backend("jax" if args.to_orbax else "torch").write_checkpoint(partial, flat(state))
    write_whole(partial / CHECKSUMS, json_bytes(with_checksum({"files": file_hashes(partial)})))
    partial.rename(out)
    print(f"{out}: {3 * len(state.weights)} tensors of {like / STATE_FILE}, step {state.step}")


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def check_files(folder: Path) -> None:
    """Compare a folder with its checksums. Raises UserError, naming the file, if one is not as it was written."""
    if not (folder / CHECKSUMS).is_file():
        notice(f"{folder} has no {CHECKSUMS}: it is checked as far as its own format goes")
        return
    content = read_json(folder / CHECKSUMS)
    if not isinstance(content, dict) or not has_its_checksum(content) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / CHECKSUMS}: damaged; convert the checkpoint again")
    found = file_hashes(folder)
    for name in sorted(set(found) | set(content["files"])):
        if name not in found:
            raise UserError(f"{folder / name}: missing; convert the checkpoint again")
        if found[name] != content["files"].get(name):
            raise UserError(
                f"{folder / name}: damaged (its sha256 is not the recorded one); convert the checkpoint again"
            )


def flat(state: TrainingState) -> dict[str, np.ndarray]:
    """A training state as one flat dict of arrays."""
    tree = {f"{part}.{name}": np.array(x) for part in PARTS for name, x in getattr(state, part).items()}
    return tree | {name: np.array(getattr(state, name), np.int64) for name in COUNTERS}


def to_state(cfg: ModelConfig, source: str, tree: dict[str, np.ndarray]) -> TrainingState:
    """The inverse of `flat`. Raises UserError for a tensor that is missing, has another shape, or cannot be what it is
    called.
    """
    parts = []
    for part in PARTS:
        tensors = {name: tree[f"{part}.{name}"] for name in tensor_shapes(cfg) if f"{part}.{name}" in tree}
        check_tensors(cfg, tensors, f"{source}, {part}")
        for name, tensor in tensors.items():
            check_finite(f"{part}.{name}", tensor)
        parts.append(tensors)
    step, adam_count = (int(tree[name]) for name in COUNTERS)
    if not 0 <= adam_count <= step:
        raise UserError(f"{source}: step {step} with {adam_count} updates: that cannot be")
    weights, mu, nu = parts
    return TrainingState(weights, mu, nu, step, adam_count)


if __name__ == "__main__":
    run_main(main)
