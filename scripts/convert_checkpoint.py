"""Checkpoints in the formats of Orbax (JAX) and of torch's distributed checkpoints (DCP), to and from the folder of this project.

    python scripts/convert_checkpoint.py --from runs/first/step-00001000 --to-orbax exported/orbax
    python scripts/convert_checkpoint.py --from runs/first/step-00001000 --to-dcp exported/dcp
    python scripts/convert_checkpoint.py --from-orbax exported/orbax --like runs/first/step-00001000 --to runs/again
    python scripts/convert_checkpoint.py --from-dcp exported/dcp --like runs/first/step-00001000 --to runs/again

Both hold a flat tree of canonical tensors, `weights.<name>`, `mu.<name>` and `nu.<name>`, and the counters `step` and `adam_count`. The
other settings of a run, and its tokenizer, are taken from the folder given as --like.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from flags import make_parser

from llm_common.checkpoint import STATE_FILE, TrainingState, load_checkpoint, save_checkpoint
from llm_common.errors import UserError, require_framework, require_package, run_main
from llm_common.hf_tokenizer import open_tokenizer
from llm_common.tensors import check_tensors, tensor_shapes

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
        read = read_orbax if args.from_orbax else read_dcp
        state = to_state(cfg, read(args.from_orbax or args.from_dcp, flat(state)))
    if args.to is not None:
        tokenizer = open_tokenizer(like) if any(like.glob("tokenizer*.json")) else None
        print(save_checkpoint(out, cfg, state, settings, tokenizer))
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    (write_orbax if args.to_orbax else write_dcp)(partial, flat(state))
    partial.rename(out)
    print(f"{out}: {3 * len(state.weights)} tensors of {like / STATE_FILE}, step {state.step}")


def flat(state: TrainingState) -> dict[str, np.ndarray]:
    """A training state as one flat dict of arrays."""
    tree = {f"{part}.{name}": np.array(x) for part in PARTS for name, x in getattr(state, part).items()}
    return tree | {name: np.array(getattr(state, name), np.int64) for name in COUNTERS}


def to_state(cfg: Any, tree: dict[str, np.ndarray]) -> TrainingState:
    """The inverse of `flat`. Raises UserError for a tensor that is missing or has another shape."""
    parts = []
    for part in PARTS:
        tensors = {name: tree[f"{part}.{name}"] for name in tensor_shapes(cfg) if f"{part}.{name}" in tree}
        check_tensors(cfg, tensors, part)
        parts.append(tensors)
    return TrainingState(*parts, *(int(tree[name]) for name in COUNTERS))


def write_orbax(path: Path, tree: dict[str, np.ndarray]) -> None:
    require_package("orbax", "jax")
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)


def read_orbax(path: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    require_package("orbax", "jax")
    import orbax.checkpoint as ocp

    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(path.resolve())
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"{path}: not an Orbax checkpoint of these tensors ({str(error).splitlines()[0]})") from None
    return {name: np.asarray(x) for name, x in restored.items()}


def write_dcp(path: Path, tree: dict[str, np.ndarray]) -> None:
    require_framework("torch")
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is one process, which is what we ask for
        save({name: torch.from_numpy(x) for name, x in tree.items()}, checkpoint_id=path, no_dist=True)


def read_dcp(path: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    require_framework("torch")
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    tensors = {name: torch.empty(x.shape, dtype=torch.from_numpy(x[..., None]).dtype) for name, x in like.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(tensors, checkpoint_id=path, no_dist=True)
    except Exception as error:
        raise UserError(f"{path}: not a DCP checkpoint of these tensors ({str(error).splitlines()[0]})") from None
    return {name: x.numpy() for name, x in tensors.items()}


if __name__ == "__main__":
    run_main(main)
