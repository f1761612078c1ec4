"""Checkpoints in the formats of Orbax (JAX) and of torch's distributed checkpoints (DCP), to and from the folder of
this project.

    one-model convert-checkpoint --from runs/first/step-00001000 --to-orbax exported/orbax
    one-model convert-checkpoint --from runs/first/step-00001000 --to-dcp exported/dcp
    one-model convert-checkpoint --from-orbax exported/orbax --like runs/first/step-00001000 --to runs/again
    one-model convert-checkpoint --from-dcp exported/dcp --like runs/first/step-00001000 --to runs/again

Both hold a flat tree of canonical tensors, `weights.<name>`, `mu.<name>` and `nu.<name>`, and the counters `step` and
`adam_count`. The other settings of a run, and its tokenizer, are taken from the folder given as --like. Beside what is
written lies checksums.json; a folder that has it is compared with it, of one that others wrote everything is checked
that the format itself can tell. No pickle is executed: DCP's `.metadata`, which is one, is read by a reader that knows
its few names.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from llm_common.errors import (
    UserError,
    json_bytes,
    with_checksum,
    write_whole,
)
from llm_common.run.checkpoint import STATE_FILE, load_checkpoint, save_checkpoint
from llm_common.text.hf_tokenizer import load_tokenizer
from llm_tools.converting import CHECKSUMS, check_files, file_hashes, flat, to_state
from llm_tools.flags import make_parser
from llm_tools.frameworks import open_backend


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("convert-checkpoint", __doc__)
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
    args = parser.parse_args(argv)
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
