"""Programs compiled for TPUs that are not there, and what the compiler says of them."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from llm_common.config import ExecutionConfig, Recipe, SamplingConfig, TrainConfig, preset
from llm_common.errors import UserError, require_package
from llm_common.processes import lifeline
from llm_common.run.estimates import GIB, flops_per_step, memory_per_step
from llm_common.sharding import MeshConfig, check_sharded
from llm_tools.hlo import Program

# Of a chip: memory (GiB), peak of bfloat16 matrix products (FLOP/s), memory and interconnect bandwidth (bytes/s, the
# latter of all links in one direction). Source: Google Cloud's pages of the versions.
CHIPS = {
    "v5e": (16, 197e12, 819e9, 200e9),
    "v5p": (95, 459e12, 2765e9, 600e9),
    "v6e": (32, 918e12, 1640e9, 448e9),
}


ACCELERATOR = {"v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}


# Of the table: preset, topology, meshes of the train and the decode step, sequences of the two, tokens of a sequence.
CASES = (
    ("1b", "v5e:4x4", "fsdp=16", "data=4,tensor=4", 16, 16, 2048),
    ("1b", "v5p:2x2x2", "fsdp=8", "data=2,tensor=4", 16, 16, 2048),
    ("1b", "v6e:4x4", "fsdp=16", "data=4,tensor=4", 32, 16, 2048),
    ("8b", "v5e:8x8", "fsdp=16,tensor=4", "data=8,tensor=8", 16, 32, 4096),
    ("8b", "v5p:2x4x4", "fsdp=8,tensor=4", "data=4,tensor=8", 8, 32, 8192),
    ("8b", "v6e:4x8", "fsdp=8,tensor=4", "data=4,tensor=8", 8, 32, 8192),
)


def write_table(path: Path) -> None:
    """Compile all cases, each in a process of its own, whose environment names its version, and write the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        for name, topology, train_mesh, decode_mesh, train_batch, decode_batch, length in CASES:
            for step, mesh, batch in (("train", train_mesh, train_batch), ("decode", decode_mesh, decode_batch)):
                flags = {"--preset": name, "--topology": topology, "--mesh": mesh, "--batch-size": str(batch)}
                flags |= {"--seq-len": str(length), "--step": step, "--out": str(file)}
                with lifeline() as (descriptor, variables):
                    subprocess.run(
                        [sys.executable, sys.argv[0], *itertools.chain(*flags.items())],
                        env={**os.environ, **variables},
                        pass_fds=[descriptor],
                        check=True,
                    )
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = []
    for r in rows:
        head = f"| {r['preset']} | {r['step']} | {r['topology']} | {r['mesh']} | {r['batch']} x {r['seq_len']} "
        if "error" in r:
            lines.append(f"{head}| does not compile: {r['error'][:200]} |")
            continue
        gib = lambda key, r=r: f"{r[key] / GIB:.2f}" if key in r else ""
        bounds = ", ".join(f"{key[6:]} {1e3 * x:.1f}" for key, x in r.items() if key.startswith("bound_"))
        calls = (
            ", ".join(f"{call} x {n}" for call, n in r["custom_calls"].items() if call == "tpu_custom_call") or "none"
        )
        lines.append(
            f"{head}| {'yes' if r['fits'] else 'NO'} | {gib('peak')} | {gib('arguments')} | {gib('temporaries')} | "
            f"{gib('model_memory')} "
            f"| {gib('moved')} | {gib('in_loops')} | {calls} | {bounds} | {r['seconds']:.0f} |"
        )
    import jax
    import libtpu  # pyright: ignore[reportMissingImports]

    table = "\n".join(lines)
    path.write_text(
        f"""# TPU: compiled, never executed

The train and decode steps of `jax_llm`, compiled by the TPU's own compiler for chips that were not there. Bytes and collectives are
what the compiler says; the bounds are floors from data sheets; no step was run. bfloat16, splash attention and full
rematerialisation in training, layers as one scan; decoding is one call, which draws 16 tokens of every text. GiB are of one chip.

| preset | step | topology | mesh | batch | fits | peak | arguments | temporaries | our model | moved | of it in loops | kernels | at least, ms | compiled in, s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{table}

"Our model" is what `train.py --dry-run` prints. "Moved" are the results of all collectives of a step, with a loop's body as often as it
runs. {date.today()}, jax {jax.__version__}, libtpu {libtpu.__version__}. Made by `scripts/tpu_compile.py --table`.
""",
        encoding="utf-8",
    )


def prepare(version: str) -> None:
    """What the TPU's compiler asks of the environment; before JAX is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": ACCELERATOR[version],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    require_package("libtpu", "tpu")


def make_topology_mesh(topology: str, config: MeshConfig | None) -> tuple[Any, MeshConfig]:
    """A mesh of the chips of a topology that is not there. Raises UserError if they are not as many as the mesh
    takes.
    """
    from jax.experimental import topologies

    from jax_llm.engine.distributed import mesh_of

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise UserError(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    config = config or MeshConfig(fsdp=len(devices))
    if config.size != len(devices):
        raise UserError(f"--mesh {config} takes {config.size} chips, but {topology} has {len(devices)}")
    return mesh_of(config, devices), config


def compile_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    version = args.topology.partition(":")[0]
    if version not in CHIPS:
        raise UserError(f"--topology {args.topology}: version {version!r} is unknown; known: {', '.join(CHIPS)}")
    prepare(version)
    import dataclasses

    mesh, config = make_topology_mesh(args.topology, MeshConfig.parse(args.mesh) if args.mesh else None)
    cfg = preset(args.preset)
    if args.layers:
        cfg = dataclasses.replace(cfg, num_hidden_layers=args.layers)
    train = TrainConfig(
        batch_size=args.batch_size or config.batch_shards,
        seq_len=args.seq_len,
        compute_dtype=args.compute_dtype,
    )
    execution = ExecutionConfig(attention_backend=args.attention_backend, remat=args.remat, scan_layers=not args.loop)
    recipe = Recipe(cfg, train, execution=execution)
    check_sharded(config, recipe)
    rows = []
    for step in args.step or ["train", "decode"]:
        lower = lower_train if step == "train" else lower_decode
        start = time.perf_counter()
        lowered = lower(recipe, mesh)
        try:
            compiled, error = lowered.compile(), ""
        except Exception as problem:
            compiled, error = None, " ".join(str(problem).split())[:600]
        seconds = time.perf_counter() - start
        row = {
            "step": step,
            "preset": args.preset,
            "layers": cfg.num_hidden_layers,
            "topology": args.topology,
            "mesh": str(config),
        }
        row |= {
            "batch": train.batch_size,
            "seq_len": train.seq_len,
            "dtype": train.compute_dtype,
            "remat": execution.remat,
        }
        row |= {
            "attention": execution.attention_backend,
            "scan": execution.scan_layers,
            "seconds": round(seconds, 1),
            "date": str(date.today()),
        }
        rows.append(
            row | (report(compiled, recipe, config, version, step) if compiled is not None else {"error": error})
        )
    return rows


def lower_train(recipe: Recipe, mesh) -> Any:
    import jax
    import jax.numpy as jnp

    from jax_llm.engine.distributed import compiled_train_step
    from jax_llm.engine.train import init_state
    from llm_common.schedule import step_scalars

    train = recipe.train
    state = jax.eval_shape(lambda: init_state(recipe))
    tokens = jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32)
    scalars = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), step_scalars(recipe.optimizer, 0, 0))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return compiled_train_step(recipe, mesh).lower(state, tokens, tokens, (scalars, scalars), count)


def lower_decode(recipe: Recipe, mesh) -> Any:
    """One token of every text of a batch, against a cache of seq_len slots."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jax_llm.engine import distributed
    from jax_llm.engine.decoding import decode
    from jax_llm.engine.generate import CHUNK
    from jax_llm.fast.kernels import make_kernels
    from jax_llm.kv_cache import init_cache
    from jax_llm.model import CausalLM, init_params
    from llm_common.sharding import BATCH_AXES

    cfg, train = recipe.model, recipe.train
    dtype, rows = jnp.dtype(train.compute_dtype), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(
        put, jax.eval_shape(lambda: init_params(cfg, 0, dtype)), distributed.param_shardings(cfg, mesh)
    )
    params["model"]["layers"] = tuple(
        jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(
                w.shape[1:], w.dtype, sharding=NamedSharding(mesh, PartitionSpec(*w.sharding.spec[1:]))
            ),
            params["model"]["layers"],
        )
        for _ in range(cfg.num_hidden_layers)
    )
    cache = jax.eval_shape(lambda: init_cache(cfg, train.batch_size, train.seq_len, dtype))
    cache = jax.tree.map(lambda x: put(x, heads if x.ndim == 4 else rows), cache)
    ids = jax.ShapeDtypeStruct((train.batch_size,), jnp.int32, sharding=rows)
    number = lambda kind: jax.ShapeDtypeStruct((), kind, sharding=NamedSharding(mesh, PartitionSpec()))
    settings = {"model": CausalLM(cfg, make_kernels("xla")), "sampling": SamplingConfig()}
    with distributed.constrain(mesh):
        return decode.lower(params, cache, ids, ids, number(jnp.uint32), n=CHUNK, **settings)


def report(compiled: Any, recipe: Recipe, config: MeshConfig, version: str, step: str) -> dict[str, Any]:
    """What the compiler says of a program, on each chip."""
    cfg, train, execution = recipe.model, recipe.train, recipe.execution
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    capacity, peak_flops, bandwidth, links = CHIPS[version]
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = arguments + temporary + kept
    collectives = program.collectives()
    moved = sum(c.size * c.times for c in collectives)
    result = {
        "arguments": arguments,
        "temporaries": temporary,
        "peak": peak,
        "fits": peak <= capacity * GIB,
        "moved": moved,
        "in_loops": sum(c.size * c.times for c in collectives if c.depth > 0),
        "collectives": [vars(c) for c in collectives[:12]],
        "custom_calls": program.custom_calls(),
        "compiler_flops": (compiled.cost_analysis() or {}).get("flops"),
        "bound_links": moved / links,
    }
    if step == "train":
        flops = flops_per_step(cfg, train) * (4 / 3 if execution.remat == "full" else 1) / config.size
        model = memory_per_step(recipe, execution.attention_backend == "splash", True, config)
        result |= {"flops": flops, "bound_flops": flops / peak_flops, "model_memory": sum(model.values())}
    else:
        from jax_llm.engine.generate import CHUNK

        read = cfg.num_parameters() * (2 if train.compute_dtype == "bfloat16" else 4) / config.tensor
        result |= {"bound_memory": CHUNK * read / bandwidth}  # a call draws so many tokens, one after the other
    return result


def print_row(row: dict[str, Any]) -> None:
    head = (
        f"{row['step']}: {row['preset']}, {row['layers']} layers, {row['topology']}, {row['mesh']}, "
        f"{row['batch']} x {row['seq_len']}, {row['dtype']}, remat {row['remat']}"
    )
    print(f"{head}; compiled in {row['seconds']} s")
    if "error" in row:
        print(f"  does not compile: {row['error']}")
        return
    print(
        f"  {'fits' if row['fits'] else 'DOES NOT FIT'}: {row['peak'] / GIB:.2f} GiB a chip (arguments "
        f"{row['arguments'] / GIB:.2f}, "
        f"temporaries {row['temporaries'] / GIB:.2f})"
        + (f"; our own model says {row['model_memory'] / GIB:.2f}" if "model_memory" in row else "")
    )
    print(
        f"  moved between chips: {row['moved'] / GIB:.2f} GiB a step and chip, {row['in_loops'] / GIB:.2f} of it in "
        "loops"
    )
    for c in row["collectives"]:
        print(
            f"    {c['kind']:18} {c['size'] / 2**20:9.2f} MiB x {c['times']:<5} depth {c['depth']}  {c['shape']}  "
            f"{c['source']}"
        )
    print(f"  custom calls: {', '.join(f'{name} x {n}' for name, n in row['custom_calls'].items()) or 'none'}")
    bounds = {key.removeprefix("bound_"): x for key, x in row.items() if key.startswith("bound_")}
    print("  bounds: " + ", ".join(f"{name} {1e3 * x:.2f} ms" for name, x in bounds.items()))
