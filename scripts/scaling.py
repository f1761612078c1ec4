"""How much faster several devices are than one: training steps of both frameworks on meshes against one device, as a
table.

    python scripts/scaling.py --device gpu --preset 1b --batch-size 8 --seq-len 2048 --mesh data=2 --mesh fsdp=2 --out docs/scaling.md

Every mesh gets the batch of one device times its number of devices along data and fsdp. The efficiency is the tokens
per second over those of one device times the number of devices. Each case runs in processes of its own, one case after
the other.
"""

import argparse
import json
from pathlib import Path

from llm_common.config import preset
from llm_common.errors import run_main
from llm_common.processes import end_with_launcher
from llm_common.sharding import MeshConfig, check_sharded
from llm_tools.bench.scaling import line, measure, recipe_of, run_case, table
from llm_tools.flags import make_parser, prepare_environment


def main() -> None:
    parser = make_parser("scaling.py", __doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences on each device")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--framework", action="append", choices=["jax", "torch"], help="default: both")
    parser.add_argument("--mesh", action="append", default=[], help="may be given several times")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--join-timeout", type=float, default=300, help="seconds to wait for the other processes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_environment(None)
    if args.worker is not None:
        end_with_launcher()
        print(json.dumps(measure(args, json.loads(args.worker))), flush=True)
        return
    cfg, results = preset(args.preset), []
    meshes = [MeshConfig.parse(text) for text in args.mesh]
    for mesh in meshes:
        check_sharded(mesh, recipe_of(args, mesh))
    for framework in args.framework or ["jax", "torch"]:
        for mesh in (None, *meshes):
            results.append(run_case(args, framework, mesh))
            print(line(args, cfg, results, results[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(table(args, cfg, results), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
