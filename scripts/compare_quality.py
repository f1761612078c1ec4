"""Does training here end where transformers' Llama with torch.optim.AdamW ends? The same weights, batches and schedule.

    python scripts/compare_quality.py --data data/tokens.npy
    python scripts/compare_quality.py --data data/tokens.npy --steps 500 --compute-dtype bfloat16 --device gpu

transformers also trains from weights moved by one unit in the last place, several times: how far those runs end from
each other is the noise of the recipe. Equal quality: the loss over the last tenth of the steps, and the held-out loss,
differ from transformers' by at most three times that noise. Exit code 0 only then.
"""

import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_common.config import ExecutionConfig, OptimizerConfig, TrainConfig, preset
from llm_common.data.datasets import TokenDataset
from llm_common.data.evaluation import Evaluation
from llm_common.errors import UserError, require_framework, require_package, run_main
from llm_common.run.log import environment
from llm_tools.bench.quality import ours, report, theirs
from llm_tools.flags import add_flags, make_parser, prepare_environment, recipe_from_flags


def main() -> int:
    parser = make_parser("compare_quality.py", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/tokens.npy"))
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--noise-runs", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or gpu")
    parser.add_argument("--out", type=Path, default=Path("runs/quality.json"))
    add_flags(parser, TrainConfig, "training")
    add_flags(parser, ExecutionConfig, "execution")
    args = parser.parse_args()
    if args.steps < 20 or args.noise_runs < 1:
        raise UserError("--steps must be at least 20 and --noise-runs at least 1")
    prepare_environment(None)
    require_package("transformers", "dev")
    for framework in ("jax", "torch"):
        require_framework(framework)
    opt = OptimizerConfig(lr_max=2e-3, lr_min=2e-4, warmup_steps=args.steps // 10, total_steps=args.steps)
    recipe = recipe_from_flags(args, preset(args.preset), opt)
    cfg, train = recipe.model, recipe.train
    data = TokenDataset(args.data, train.seq_len, train.batch_size, train.seed, cfg.vocab_size)
    held_out = Evaluation(data.tokens[-min(len(data.tokens) // 10, 20_000) :], train.seq_len, train.batch_size)
    console, results = Console(highlight=False, soft_wrap=True), {}
    runs = [
        "JAX",
        "PyTorch",
        "transformers",
        *(f"transformers, moved by one ulp ({i + 1})" for i in range(args.noise_runs)),
    ]
    for i, name in enumerate(runs):
        start = time.perf_counter()
        settings = (recipe, data, held_out, args)
        losses, evaluated = ours(("jax", "torch")[i], *settings) if i < 2 else theirs(i - 2, *settings)
        tail = float(np.mean(losses[-max(1, len(losses) // 10) :]))
        results[name] = {"last_tenth": tail, "held_out": evaluated, "losses": losses}
        console.print(
            f"{name}: {tail:.5f} over the last tenth, held out {evaluated:.5f}  ({time.perf_counter() - start:.0f} s)"
        )
    ok = report(console, results, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()}
    args.out.write_text(json.dumps({"environment": environment(), "settings": settings, "runs": results}) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)
