"""Checks of step scalars and files, which neither framework owns, and of runs that go on from a file in the other
framework.
"""

import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from llm_common import random_bits, schedule
from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.files.export import export
from llm_common.files.tensor_files import open_model_files
from llm_common.run.checkpoint import load_checkpoint, save_checkpoint
from parity import spec, spec_run
from parity.checks.training import UPDATE_ALLOWED, spec_train, update_of
from parity.core.compare import TORCH, Row, on_both, round_to, shared, three_way, verdict
from parity.core.inputs import RandomBatches, families, random_weights, start_state
from parity.sides.settings import Settings
from parity.trace.trace import located
from torch_llm.engine.checkpoint import to_training_state

SCHEDULE_ALLOWED = 1e-15  # two float64 spellings of one formula, relative to lr_max; one step early shows above 1e-6


def check_random(s: Settings) -> Iterator[Row]:
    """Random words of seeds and integers of every size, and the uniform numbers that they give: what initial weights,
    the order of batches and sampled tokens are drawn from.
    """
    cases = list(itertools.product((0, s.seed, 2**31 - 1, 2**31 + 5, 2**32 - 1), (0, 1, 1000, 2**31 + 7), (1, 5, 64)))
    keys = [(spec.fold_in((0, seed), folded), n) for seed, folded, n in cases]
    expected = [(spec.random_bits(key, n), spec.uniform(key, n)) for key, n in keys]
    wrong = 0
    for (seed, folded, n), (bits, _) in zip(cases, expected, strict=True):
        found = random_bits.random_bits(random_bits.fold_in(random_bits.key(seed), folded), n)
        wrong += not np.array_equal(found, bits)
    yield shared("random", "draws of NumPy with other words", wrong, place="llm_common.random_bits")
    for dtype in s.dtypes:
        words, numbers = [0, 0], [0, 0]
        for i, side in enumerate(s.sides(dtype)):
            for case, (bits, uniform) in zip(cases, expected, strict=True):
                found = side.random(*case)
                words[i] += not np.array_equal(found[0], bits)
                numbers[i] += not np.array_equal(found[1], uniform)
        for what, counts in (("words", words), ("uniform numbers", numbers)):
            blamed = verdict(bool(counts[0]), bool(counts[1]), alike=True)
            place = "random_bits.uniform" if what != "words" else "random_bits.threefry2x32"
            item = f"draws of other {what}, of {len(cases)}"
            yield Row("random", item, dtype, max(counts), 0, not blamed, blamed, place=place if blamed else "")


def check_schedule(s: Settings) -> Iterator[Row]:
    """The learning rate and the bias corrections of every step, as numbers."""
    configs = [
        OptimizerConfig(lr_max=m, lr_min=low, warmup_steps=w, total_steps=n, beta1=b1, beta2=b2)
        for m, low, w, n, b1, b2 in (
            (1e-3, 1e-4, 0, 1, 0.9, 0.95),
            (1e-3, 1e-4, 3, 7, 0.8, 0.999),
            (3e-2, 0.0, 10, 50, 0.0, 0.9),
            (5e-4, 5e-4, 1, 4, 0.99, 0.5),
        )
    ]
    worst = 0.0
    for opt in configs:
        for step in range(opt.total_steps + 3):
            difference = abs(schedule.learning_rate(opt, step) - spec_run.learning_rate(opt, step)) / opt.lr_max
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    yield shared("schedule", "learning rate of every step", worst, SCHEDULE_ALLOWED, "learning_rate", "float64")
    worst = 0.0
    for opt, n in itertools.product(configs, (1, 2, 3, 10, 100, 10_000)):
        pairs = zip(schedule.bias_corrections(opt.beta1, opt.beta2, n), spec_run.bias_corrections(opt, n), strict=True)
        # a power of n factors, each of them rounded
        worst = max(worst, *(abs(a - b) / n for a, b in pairs))
    yield shared("schedule", "bias corrections", worst, SCHEDULE_ALLOWED, "bias_corrections", "float64")
    worst = 0.0
    for opt, step, count in itertools.product(configs, (0, 4, 6), (0, 2, 4)):
        wanted = (spec_run.learning_rate(opt, step), *spec_run.bias_corrections(opt, count + 1))
        pairs = zip(schedule.step_scalars(opt, step, count), wanted, strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    yield shared("schedule", "scalars of a step after a skip", worst, SCHEDULE_ALLOWED, "step_scalars", "float64")


def check_files(s: Settings) -> Iterator[Row]:
    """A checkpoint and an export as others read them: names, values bit for bit, counters, roundings, config."""
    wrong = 0
    for cfg in (s.cfg, *families(s.cfg).values()):
        config = cfg.to_hf()
        plain = {key: config.get(key) for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps")}
        wrong += sum(value != getattr(cfg, key) for key, value in plain.items())
        wrong += config["rope_parameters"]["rope_theta"] != cfg.rope_theta
        wrong += config["tie_word_embeddings"] != cfg.tie_word_embeddings
        wrong += ModelConfig.from_hf(config) != cfg
    yield shared("files", "fields of config.json", wrong, place="to_hf")
    weights = random_weights(s.cfg, s.seed, "float32")
    state = start_state(weights, "float32")
    rng = np.random.default_rng((s.seed, 10))
    for moment in (state.mu, state.nu):
        for name, x in moment.items():
            moment[name] = rng.random(x.shape).astype(np.float32)  # type: ignore[index]
    state.step, state.adam_count = 12, 11
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), s.cfg, state, {})
        stored = safetensors.numpy.load_file(path / "model.safetensors")
        moments = safetensors.numpy.load_file(path / "optimizer.safetensors")
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _, loaded, _ = load_checkpoint(path, s.cfg)
        wrong = _differing(stored, state.weights) + abs(content["step"] - 12) + abs(content["adam_count"] - 11)
        expected = {f"mu.{k}": x for k, x in state.mu.items()} | {f"nu.{k}": x for k, x in state.nu.items()}
        wrong += _differing(moments, expected)
        yield shared("files", "values of a checkpoint, as safetensors reads it", wrong, place="save_checkpoint")
        wrong = _differing(loaded.weights, state.weights) + _differing(loaded.mu, state.mu)
        wrong += _differing(loaded.nu, state.nu) + abs(loaded.step - 12) + abs(loaded.adam_count - 11)
        yield shared("files", "values of a checkpoint, read back", wrong, place="load_checkpoint")
        # halfway between two numbers of bfloat16, and of float16, whose last kept bit is 0 or 1
        ties = [*np.array([0x3F808000, 0x3F818000, 0xBF808000, 0xBF838000], np.uint32).view(np.float32)]
        ties += [1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11), 2**-24]
        norm = weights["model.norm.weight"]
        norm[:] = np.resize(ties, norm.shape)
        for dtype in ("float32", "bfloat16", "float16"):
            export(Path(folder) / dtype, s.cfg, weights, dtype=dtype, shard_bytes=1 << 14)
            read = open_model_files(Path(folder) / dtype)
            wrong = sum(int((read[k].astype(np.float64) != round_to(x, dtype)).sum()) for k, x in weights.items())
            yield shared("files", f"values of an export in {dtype}, in shards", wrong, place="export")


def _differing(a, b) -> int:
    """Elements that are not bit for bit the same; all of a tensor that is missing."""
    return sum(int((np.asarray(a[k]) != x).sum()) if k in a else x.size for k, x in b.items()) + len(set(a) - set(b))


def check_resume(s: Settings) -> Iterator[Row]:
    """Three steps in one framework, a checkpoint on disk, three more in the other, against six of the specification."""
    if "float64" not in s.dtypes:
        return
    data, weights = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), random_weights(s.cfg, s.seed)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=2, total_steps=6, max_grad_norm=1.0)
    sides = s.sides("float64")
    first_half, expected = (spec_train(s, start_state(weights), opt, data, n)[0] for n in (3, 6))
    halves = on_both(sides, lambda side: side.train(start_state(weights), opt, data, 3))
    updates = [update_of(end.weights, weights) for end in (*halves, first_half)]
    row = three_way("resume", "steps before", "float64", updates, UPDATE_ALLOWED)
    if not row.ok:  # what has gone wrong already is not that the run goes on
        yield dataclasses.replace(located(dataclasses.replace(row, check="adamw"), s), check="resume")
        return
    ends = []
    for half, second in zip(halves, sides[::-1], strict=True):
        with tempfile.TemporaryDirectory() as folder:
            _, loaded, _ = load_checkpoint(save_checkpoint(Path(folder), s.cfg, half, {}), s.cfg)
        ends.append(second.train(loaded, opt, data, 6))
    updates = [update_of(end.weights, weights) for end in (ends[1], ends[0], expected)]
    item = "JAX goes on from torch, torch from JAX"
    row = three_way("resume", item, "float64", updates, UPDATE_ALLOWED, "the side named is the one that went on")
    yield row if row.ok else dataclasses.replace(row, place="to_training_state, from_training_state")
    yield _own_state_row(s)


def _own_state_row(s: Settings) -> Row:
    """torch's own `state_dict` of a bfloat16 run, loaded into another that then goes on alone: neither sees the other's
    memory.
    """
    cfg, opt = dataclasses.replace(s.cfg, num_hidden_layers=1), OptimizerConfig(lr_max=1e-2, total_steps=9)
    data: Any = RandomBatches(cfg, s.seed, batch=s.batch, length=s.length)
    side = s.sides("bfloat16", cfg)[1]
    start = start_state(random_weights(cfg, s.seed, "float32"), "float32")
    whole = side.train(start, opt, data, 4)
    first, second = side.trainer(start, opt, data), side.trainer(start, opt, data)
    first.fit(data, 2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = first.step
    first.fit(data, 4)
    second.fit(data, 4)
    wrong = 0
    for trainer in (first, second):
        end = to_training_state(trainer)
        for found, wanted in ((end.weights, whole.weights), (end.mu, whole.mu), (end.nu, whole.nu)):
            wrong += sum(not np.array_equal(found[name], wanted[name]) for name in wanted)
    place = "AdamW.load_state_dict" if wrong else ""
    item = "torch's own state dicts, loaded into another run: tensors that differ"
    return Row("resume", item, "bfloat16", wrong, 0, not wrong, TORCH if wrong else "", place=place)
