"""The whole story on one page: a tokenizer, one model trained in both frameworks, the ladder, the same text
from both.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jax_llm.engine import backend as jax_backend
from llm_common.config import OptimizerConfig, Recipe, SamplingConfig, TrainConfig, preset
from llm_common.data.datasets import TokenDataset, unigram_entropy, write_tokens
from llm_common.run.checkpoint import load_checkpoint, save_checkpoint
from llm_common.run.folder import Run
from llm_common.run.settings import run_settings
from llm_common.text.bpe_trainer import train_bpe
from llm_common.text.corpus import documents
from llm_common.text.tokenizer import FILE_NAME, Tokenizer
from parity.checks.ladder import run_with_figures
from parity.checks.training import LOSS_FACTOR, LOSS_FLOOR
from parity.core.compare import JAX, TORCH, Row, Side
from parity.core.inputs import start_state
from parity.report.report import draw_curves, make_console, print_and_write, print_progress
from parity.sides.jax_side import JaxSide
from parity.sides.settings import Settings
from parity.sides.torch_side import TorchSide
from torch_llm.engine import backend as torch_backend

STEPS = 200
PROMPT = "Return a string"
NATS_BELOW_UNIGRAM = 0.8  # what a model that learned something must beat the token frequencies by


def run_demo(out: Path, data: str | None = None, steps: int = STEPS, ladder: Settings | None = None) -> bool:
    """Everything, printed as it goes; files go to `out`. Returns whether every check holds."""
    console, start = make_console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console.rule("[bold]1. text and tokenizer", align="left")
    tokenizer, dataset, unigram = prepare(console, out, data)

    console.rule("[bold]2. the same model, trained twice", align="left")
    cfg, train = preset("demo"), TrainConfig(seed=0, batch_size=16, seq_len=128)
    opt = OptimizerConfig(lr_max=2e-3, lr_min=2e-4, warmup_steps=min(20, steps // 2), total_steps=steps)
    dataset = TokenDataset(dataset, train.seq_len, train.batch_size, train.seed, cfg.vocab_size)
    console.print(
        f"{cfg.num_parameters():,} parameters, {steps} steps of {train.batch_size} x {train.seq_len} tokens, "
        "float32, seed 0"
    )
    curves, folders = {}, {}
    for name in ("jax", "torch", "control"):
        if name == "control":
            console.print(
                "control: JAX again, every tenth weight moved by one ulp, shows what rounding alone does to this run"
            )
        curves[name], folders[name] = _train(console, name, out, Recipe(cfg, train, opt), dataset, tokenizer)
    rows = _training_rows(curves, unigram)
    picture = out / "loss_curves.png"
    title = f"One model, one seed, two frameworks: {cfg.num_parameters() / 1e6:.1f}M parameters, float32"
    draw_curves(picture, curves, unigram, title)

    console.rule("[bold]3. the ladder: logits, gradients, optimizer, trajectories, tokens", align="left")
    settings = ladder or Settings()
    found, drawn = run_with_figures(
        settings, lambda *args: print_progress(console, *args), jobs=min(2, os.cpu_count() or 1)
    )
    rows += found

    console.rule("[bold]4. the same text from both", align="left")
    row, text = _generate(console, folders, tokenizer)
    rows.append(row)

    console.rule("[bold]verdict", align="left")
    last = {name: curve[-1] for name, curve in curves.items()}
    summary = (
        f"Loss after {steps} steps: JAX {last['jax']:.6f}, PyTorch {last['torch']:.6f}, JAX moved by one ulp "
        f"{last['control']:.6f} nats per token; unigram entropy {unigram:.3f}."
    )
    paragraphs = [summary, "", f"![loss curves]({picture.name})", "", "```", *text, "```"]
    content = {"seconds": time.perf_counter() - start, "losses": curves, "unigram_entropy": unigram}
    content |= {"figures": drawn, "texts": text, "title": "Parity report: one language model, trained twice"}
    ok = print_and_write(console, out, rows, paragraphs, settings.device_name(), **content)
    console.print(f"{summary} Picture: {picture}")
    return ok


def prepare(console: Console, out: Path, data: str | None) -> tuple[Tokenizer, Path, float]:
    """Tokenizer and token file of a corpus; prints what they are and the unigram entropy."""
    start = time.perf_counter()
    texts = list(documents(data))
    tokenizer = train_bpe(texts, preset("demo").vocab_size)
    tokenizer.save(out / FILE_NAME)
    path = out / "tokens.npy"
    info = write_tokens(path, texts, tokenizer)
    unigram = unigram_entropy(np.load(path))
    source = "the documentation that ships with Python" if data is None else data
    console.print(
        f"{source}: {info['documents']:,} documents, {info['bytes'] / 1e6:.1f} MB; {info['tokens']:,} tokens of "
        f"{tokenizer.vocab_size} kinds; unigram entropy {unigram:.3f} nats  ({time.perf_counter() - start:.0f} s)"
    )
    return tokenizer, path, unigram


BACKENDS = {module.BACKEND.name: module.BACKEND for module in (jax_backend, torch_backend)}


def _train(console, name, out, recipe: Recipe, dataset, tokenizer) -> tuple[list[float], Path]:
    """One run from step 0; its losses and its last checkpoint. The control resumes from a step 0 with weights moved."""
    run, framework, train = out / name, "torch" if name == "torch" else "jax", recipe.train
    for old in run.glob("step-*"):  # a demo always trains again
        shutil.rmtree(old)
    (run / "log.jsonl").unlink(missing_ok=True)
    if name == "control":
        state = start_state(JaxSide(recipe.model, train.master_dtype).initial_weights(train.seed), train.master_dtype)
        for x in state.weights.values():
            x.flat[::10] = np.nextafter(x.flat[::10], np.float32(np.inf))
        save_checkpoint(run, recipe.model, state, run_settings(recipe, dataset, tokenizer))
    losses, start = [], time.perf_counter()
    columns = (
        TextColumn(f"{name:7}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console, transient=True)
    with bar as progress:
        task = progress.add_task("", total=recipe.optimizer.total_steps, loss=float("nan"))

        def on_event(row: dict[str, Any]) -> None:
            if "event" not in row:
                losses.append(row["loss"])
                progress.update(task, advance=1, loss=row["loss"])

        training = Run(run, recipe, dataset, framework, tokenizer=tokenizer, on_event=on_event)
        folder = BACKENDS[framework].fit_and_save(training, "cpu", None)
    seconds = time.perf_counter() - start
    tokens = len(losses) * train.batch_size * train.seq_len
    console.print(
        f"{name:7}  loss {losses[0]:.6f} -> {losses[-1]:.6f}  {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"
    )
    return losses, folder


def _training_rows(curves, unigram: float) -> list[Row]:
    jax, torch, control = (np.array(curves[name]) for name in ("jax", "torch", "control"))
    difference, noise = float(np.abs(jax - torch).max()), float(np.abs(jax - control).max())
    # rounding differs from the first step on and training amplifies it, in this run as much as the control shows
    allowed = max(LOSS_FLOOR["float32"], LOSS_FACTOR["float32"] * noise)
    ok = difference <= allowed
    rows = [
        Row(
            "training",
            "largest difference of the loss curves",
            "float32",
            difference,
            allowed,
            ok,
            Side.NOBODY if ok else Side.UNKNOWN,
            f"one ulp in every tenth weight within JAX: {noise:.1e}",
        )
    ]
    for name, curve in ((JAX, jax), (TORCH, torch)):
        last = float(curve[-10:].mean())
        limit = unigram - NATS_BELOW_UNIGRAM
        item = f"{name}: loss of the last 10 steps; unigram entropy {unigram:.3f} - {NATS_BELOW_UNIGRAM}"
        rows.append(Row("training", item, "float32", last, limit, last <= limit, "" if last <= limit else name))
    return rows


def _generate(console: Console, folders: dict[str, Path], tokenizer: Tokenizer) -> tuple[Row, list[str]]:
    """Each framework continues a prompt with the weights it trained itself, then torch with those that JAX trained.

    Returns the row of the latter, and the lines that show the former.
    """
    prompt = np.array([tokenizer.encode(PROMPT)])
    sampling = SamplingConfig(temperature=0.8, top_k=40, seed=1)
    texts, weights, lines = {}, {}, []
    for name, side in (("jax", JaxSide), ("torch", TorchSide)):
        cfg, state, _ = load_checkpoint(folders[name])  # the sha256 of every file
        weights[name] = state.weights
        texts[name] = side(cfg, "float32").generate(weights[name], prompt, 60, sampling, tokenizer.eos_ids)[0]
        lines.append(f"{name:5}  {PROMPT + tokenizer.decode(texts[name])!r}")
    crossed = TorchSide(cfg, "float32").generate(weights["jax"], prompt, 60, sampling, tokenizer.eos_ids)[0]
    same = next(
        (i for i, (a, b) in enumerate(zip(*texts.values(), strict=False)) if a != b), min(map(len, texts.values()))
    )
    lines.append(
        f"each from the weights it trained itself: the first {same} of {len(texts['jax'])} tokens are the same"
    )
    for line in lines:
        console.print(line, markup=False)
    differing = sum(a != b for a, b in zip(texts["jax"], crossed, strict=False)) + abs(len(texts["jax"]) - len(crossed))
    ok = differing == 0
    item = f"tokens that differ of {len(texts['jax'])}, JAX's checkpoint read by torch"
    return Row("text", item, "float32", differing, 0, ok, Side.NOBODY if ok else Side.UNKNOWN), lines
