"""Train a model in either framework: same flags, same batches, same files.

    one-model train --framework jax --out runs/first
    one-model train --framework torch --out runs/second --lr-max 2e-3 --total-steps 500 --save-every 100
    one-model train --framework torch --out runs/gpu --device gpu --compute-dtype bfloat16 --preset 124m
    one-model train --framework jax --out runs/tuned --init-from my_llama/ --data data/questions.npz
    one-model train --config run.toml --framework torch
    one-model train --framework jax --out runs/first --dry-run
    one-model train --framework jax --out runs/many --mesh data=2,fsdp=4
    one-model train --framework torch --out runs/many --mesh data=2,fsdp=4

The same command again goes on from the newest checkpoint in --out; so does the other framework. A larger --total-steps
extends a run: the learning rate follows the new total from there on, the moments are kept. Ctrl-C (or SIGTERM) saves
after the step, before anything else, and ends; a second one ends at once. The exit code is 0 when the run ended or was
stopped in this way.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llm_common.config import (
    PRESETS,
    ExecutionConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    TrainConfig,
)
from llm_common.data.answers import open_dataset
from llm_common.data.datasets import TokenDataset, check_data
from llm_common.errors import UserError, counted, is_out_of_memory, notice, require_framework
from llm_common.run.estimates import flops_per_step, memory_advice, memory_per_step, peak_flops
from llm_common.run.folder import LOG_FILE, Run, check_goes_on
from llm_common.run.progress import TrainingProgress
from llm_common.run.settings import run_settings
from llm_common.run.trackers import parse_services
from llm_common.sharding import ONE_DEVICE, MeshConfig, check_sharded
from llm_common.text.hf_tokenizer import open_tokenizer
from llm_common.text.tokenizer import check_vocabulary
from llm_tools.flags import (
    add_flags,
    add_mesh_flags,
    check_device,
    from_flags,
    join,
    keep_memory_of_a_small_step,
    make_parser,
    parse_with_toml,
    prepare_environment,
    require,
)
from llm_tools.frameworks import open_backend
from llm_tools.training import check_memory, check_separator, choose_model, dry_run, open_evaluation, separator_of


def make_train_parser() -> argparse.ArgumentParser:
    parser = make_parser("train", __doc__)
    parser.add_argument("--framework", choices=["jax", "torch"], help="needed")
    parser.add_argument("--out", type=Path, help="needed: folder of this run's checkpoints and log")
    model = parser.add_argument_group("model", "one of these three")
    model.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: demo)")
    model.add_argument("--model-config", type=Path, metavar="FILE", help="a config.json with Hugging Face's keys")
    model.add_argument("--init-from", type=Path, metavar="FOLDER", help="weights to start from: a Hugging Face folder")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=Path("data/tokens.npy"), help="of prepare-data: .npy, .npz or a folder"
    )
    data.add_argument("--eval-data", type=Path, help="held-out data (default: the -validation file beside --data)")
    data.add_argument("--tokenizer", type=Path, help="bpe.json or a folder; is saved with each checkpoint")
    data.add_argument(
        "--document-mask",
        action="store_true",
        help="no document sees another: --document-separator is what the data end documents with",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    add_mesh_flags(machine)
    machine.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "one-model-twice", metavar="FOLDER")
    machine.add_argument("--dry-run", action="store_true", help="say what the run would be, and train nothing")
    add_flags(parser, OptimizerConfig, "optimizer")
    add_flags(parser, TrainConfig, "training")
    add_flags(parser, ExecutionConfig, "execution")
    add_flags(parser, RunConfig, "checkpoints, evaluation and log")
    parser.add_argument("--log-to", metavar="NAMES", help="wandb, mlflow or both with a comma: beside log.jsonl")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_with_toml(make_train_parser(), argv)
    require(args, "framework", "out")
    require_framework(args.framework)
    services = parse_services(args.log_to)
    check_device(args.device)
    prepare_environment(args.cache_dir)
    configs = (TrainConfig, OptimizerConfig, ExecutionConfig, RunConfig)
    train, opt, execution, config = (from_flags(cls, args) for cls in configs)
    cfg, initial = choose_model(args, train.seq_len)
    recipe = Recipe(cfg, train, opt, execution)
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    if mesh is not None:
        check_sharded(mesh, recipe)
    by_the_data = {"document_separator"} if args.document_mask and train.document_separator is None else set()
    known = {key: x for key, x in recipe.settings().items() if key not in by_the_data}
    check_goes_on(args.out, lambda: {"train": known, "optimizer": dataclasses.asdict(opt)})
    tokenizer = open_tokenizer(args.tokenizer or args.init_from or Path("data/bpe.json"))
    grown = initial is None and args.model_config is None and tokenizer.vocab_size > cfg.vocab_size
    preset_size = cfg.vocab_size
    if grown:
        cfg = dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)
        recipe = dataclasses.replace(recipe, model=cfg)
    check_vocabulary(tokenizer, cfg.vocab_size)
    data = check_data(args.data, tokenizer)
    if by_the_data:
        train = dataclasses.replace(train, document_separator=separator_of(args.data, data))
        recipe = dataclasses.replace(recipe, train=train)
        if mesh is not None:
            check_sharded(mesh, recipe)
    check_separator(train.document_separator, data, cfg.vocab_size)
    dataset = open_dataset(args.data, train.seq_len, train.batch_size, train.seed, cfg.vocab_size)
    evaluation = open_evaluation(args, cfg, train, config, tokenizer)
    check_goes_on(args.out, lambda: run_settings(recipe, dataset, tokenizer))
    # What can be refused without a framework has been: to import one takes seconds.
    if grown:
        notice(f"the preset's vocabulary of {preset_size:,} becomes the tokenizer's {tokenizer.vocab_size:,}")
    keep_memory_of_a_small_step(args.device, recipe)
    backend = open_backend(args.framework)
    hosts = join(backend, args, mesh)
    plan = backend.plan_run(recipe, hosts.device)
    console = Console(highlight=False, soft_wrap=True, quiet=hosts.index > 0)
    processes = f"{hosts.count} process" + ("es" if hosts.count > 1 else "")
    where = "" if mesh is None else f", mesh {mesh}, {processes}"
    console.print(f"{args.framework}: {plan}{where}", markup=False)
    size = (
        f"{counted(len(dataset.tokens), 'token')} of data"
        if isinstance(dataset, TokenDataset)
        else counted(len(dataset.answers), "example")
    )
    held_out = "nothing held out" if evaluation is None else f"{evaluation.n_targets:,} held-out tokens"
    console.print(f"{cfg.num_parameters():,} parameters, {size}, {held_out}; log: {args.out / LOG_FILE}", markup=False)
    need = memory_per_step(recipe, not plan.keeps_scores, plan.compiled, mesh or ONE_DEVICE)
    check_memory(console, recipe, need, backend.memory_limit(hosts.device), refuse=not args.dry_run)
    flops, tokens_per_step = flops_per_step(cfg, train), train.batch_size * train.seq_len
    if args.dry_run:
        dry_run(console, recipe, need, dataset, tokenizer)
        return
    peak = peak_flops(plan.device_kind, train.compute_dtype)
    if peak is not None and mesh is not None:
        peak *= mesh.size
    memory = lambda: backend.memory_used(hosts.device)
    progress = TrainingProgress(
        console, opt.total_steps, config.log_every, tokens_per_step, flops / tokens_per_step, peak, memory
    )
    run = Run(
        args.out,
        recipe,
        dataset,
        args.framework,
        tokenizer=tokenizer,
        config=config,
        evaluation=evaluation,
        initial=initial,
        on_event=progress,
        hosts=hosts,
        log_to=services,
        roles={name: data.get(name) for name in ("document_end", "turn_end")},
    )
    if execution.deterministic and mesh is None:
        console.print(backend.cost_of_determinism(recipe, dataset, hosts.device))
    try:
        with progress:
            folder = backend.fit_and_save(run, hosts.device, mesh)
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"memory ran out: {memory_advice(recipe, need)}") from None
        raise
    progress.summary(folder, args.out / LOG_FILE)
    if not progress.losses:
        console.print(f"nothing left to do: {folder}", markup=False)
    elif run.stop_signal is not None:
        console.print("stopped as asked; the same command goes on, in either framework")
