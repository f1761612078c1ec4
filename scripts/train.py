"""Train a model in either framework: same flags, same batches, same files.

    python scripts/train.py --framework jax --out runs/first
    python scripts/train.py --framework torch --out runs/second --lr-max 2e-3 --total-steps 500
    python scripts/train.py --framework torch --out runs/gpu --device gpu --compute-dtype bfloat16 --preset 124m

The same command again goes on from the newest checkpoint in --out; so does the other framework.
"""

import argparse
import time
from pathlib import Path

from flags import add_flags, from_flags

from llm_common.config import PRESETS, ModelConfig, OptimizerConfig, TrainConfig, check_length, preset
from llm_common.data import TokenDataset, check_tokenizer
from llm_common.errors import UserError, import_side, run_main
from llm_common.run_log import RunLog
from llm_common.tokenizer import Tokenizer, check_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", required=True, choices=["jax", "torch"])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="demo", help=f"one of {', '.join(PRESETS)} (default: demo)")
    model.add_argument("--config", type=Path, help="a config.json with Hugging Face keys instead of a preset")
    parser.add_argument("--data", type=Path, default=Path("data/tokens.npy"), help="token file of prepare_data.py")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/bpe.json"), help="is saved with each checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run's checkpoints and log")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="default: only at the end")
    parser.add_argument("--log-every", type=int, metavar="STEPS", default=10)
    add_flags(parser, OptimizerConfig, "optimizer")
    add_flags(parser, TrainConfig, "training")
    args = parser.parse_args()

    for name in ("save_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    cfg = ModelConfig.from_file(args.config) if args.config else preset(args.preset)
    opt, train = from_flags(OptimizerConfig, args), from_flags(TrainConfig, args)
    check_length(cfg, train.seq_len, "seq_len")
    tokenizer = Tokenizer.load(args.tokenizer)
    check_vocabulary(tokenizer, cfg.vocab_size)
    side = import_side(args.framework, "checkpoint")
    check_tokenizer(args.data, tokenizer)
    dataset = TokenDataset(args.data, train.seq_len, train.batch_size, train.seed, cfg.vocab_size)
    print(f"{args.framework}: {import_side(args.framework, 'train').describe(cfg, train, args.device)}")
    print(f"{cfg.num_parameters():,} parameters, {len(dataset.tokens):,} tokens; log: {args.out / 'log.jsonl'}")

    tokens_in_step = train.batch_size * train.seq_len
    last_step, last_time = -1, time.perf_counter()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal last_step, last_time
        log.write({"step": step, **metrics})
        if last_step < 0:  # the first step compiles
            last_step, last_time = step, time.perf_counter()
        if step % args.log_every == 0 or step == opt.total_steps:
            now = time.perf_counter()
            rate = (step - last_step) * tokens_in_step / max(now - last_time, 1e-9)
            last_step, last_time = step, now
            print(
                f"step {step}  loss {metrics['loss']:.4f}  norm {metrics['grad_norm']:.3f}  lr {metrics['lr']:.2e}  {rate:,.0f} tokens/s"
            )

    with RunLog(args.out / "log.jsonl", framework=args.framework) as log:
        folder = side.fit_and_save(args.out, cfg, train, opt, dataset, args.device, tokenizer, args.save_every, on_step)
    print(f"saved {folder}" if last_step >= 0 else f"nothing left to do: {folder}")


if __name__ == "__main__":
    run_main(main)
