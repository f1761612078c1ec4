"""Every field of every config is declared: what it decides, and what shows it when it is dropped on the way.

numbers: the case of `parity run` in which another value on one side alone is red, on that side. execution: a structural
witness that differs with the field. bookkeeping: the unit test that is about it. A field that is not declared fails.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import jax_llm.fast.kernels
import jax_llm.model
import torch_llm.fast.kernels
import torch_llm.model
from jax_llm.engine.plan import make_model
from jax_llm.engine.train import compiled_train_step, init_state
from llm_common.config import (
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RopeScaling,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    preset,
)
from llm_common.errors import UserError
from llm_common.schedule import step_scalars
from llm_common.sharding import MeshConfig
from parity import spec_run
from parity.checks import kernels as kernel_checks
from parity.checks.fuzz import Drawn, judge
from parity.core.compare import JAX, TORCH
from parity.core.inputs import RandomBatches, random_weights, start_state
from parity.core.jaxprs import equations
from parity.sides.jax_side import JaxSide
from parity.sides.settings import Settings
from parity.sides.torch_side import TorchSide
from torch_llm.engine.train import Trainer

# field -> (a case in which its value is not the shadow's, the shadow: what a side takes in its place)
Numbers = dict[str, tuple[str, Any]]
MODEL: Numbers = {
    "vocab_size": ("run 1 {}", 40),
    "hidden_size": ('run 1 {"hidden":24}', 16),
    "intermediate_size": ("run 1 {}", 24),
    "num_hidden_layers": ('run 1 {"layers":2}', 1),
    "num_attention_heads": ('run 1 {"heads":[4,2]}', 2),
    "num_key_value_heads": ('run 1 {"heads":[4,2]}', 4),
    "head_dim": ('run 1 {"head_dim":6}', 8),
    "rope_theta": ('run 1 {"theta":30.0}', 1e4),
    "rms_norm_eps": ('run 1 {"eps":0.001}', 1e-5),
    "tie_word_embeddings": ('run 1 {"tied":true}', False),
    "model_type": ('run 1 {"family":"qwen2"}', "llama"),
    "rope_scaling": ('run 1 {"family":"llama 3"}', None),
    "sliding_window": ('run 1 {"family":"mistral"}', None),
}
OPTIMIZER: Numbers = {
    "lr_max": ('run 1 {"lr":[0.03,0.0]}', 1e-3),
    "lr_min": ('run 1 {"schedule":[1,3]}', 0.0),
    "warmup_steps": ('run 1 {"schedule":[2,5]}', 0),
    "total_steps": ("run 1 {}", 1000),
    "beta1": ('run 1 {"betas":[0.8,0.99]}', 0.9),
    "beta2": ('run 1 {"betas":[0.8,0.99]}', 0.95),
    "eps": ('run 1 {"adam_eps":0.001}', 1e-8),
    "weight_decay": ('run 1 {"decay":0.5}', 0.1),
    "max_grad_norm": ('run 1 {"clip":"active"}', None),
}
TRAIN: Numbers = {
    "document_separator": ('run 1 {"separators":2,"length":12}', None),
    "compute_dtype": ("run 1 {}", "float32"),
}
SAMPLING: Numbers = {
    "temperature": ('text 1 {"temperature":0.0,"new":11}', 1.0),
    "top_k": ('text 1 {"top_k":1,"new":11}', 0),
    "top_p": ('text 1 {"top_p":0.5,"new":11}', 1.0),
    "min_p": ('text 2 {"min_p":0.25,"new":11,"temperature":1.6}', 0.0),
    "seed": ('text 1 {"seed":7,"new":11}', 0),
}
NUMBERS: dict[type, Numbers] = {
    ModelConfig: MODEL,
    OptimizerConfig: OPTIMIZER,
    TrainConfig: TRAIN,
    SamplingConfig: SAMPLING,
}
# field -> (file of a unit test, its name)
BOOKKEEPING: dict[type, dict[str, tuple[str, str]]] = {
    ModelConfig: {"max_position_embeddings": ("tests/common/test_config.py", "length")},
    TrainConfig: {
        "seed": ("parity/checks/model.py", "check_init"),
        "batch_size": ("parity/checks/programs.py", "--batch-size"),
        "seq_len": ("parity/checks/programs.py", "--seq-len"),
    },
    RunConfig: dict.fromkeys(
        ("save_every", "save_minutes", "keep_last", "keep_best", "eval_every"),
        ("tests/common/test_run.py", ""),
    )
    | {
        "eval_batches": ("parity/checks/programs.py", "--eval-batches"),
        "log_every": ("tests/tools/test_from_text_to_text.py", "--log-every"),
    },
    MeshConfig: dict.fromkeys(("data", "fsdp", "tensor"), ("parity/sharded/sharded.py", "")),
    RopeScaling: dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        ("parity/checks/configs.py", ""),
    ),
}


class Shadowed:
    """Stands before a side and replaces one field of one kind of config on its way in."""

    def __init__(self, side: Any, cls: type, field: str, value: Any) -> None:
        self._side, self._cls, self._field, self._value = side, cls, field, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._side, name)

    def _replace(self, config: Any) -> Any:
        return dataclasses.replace(config, **{self._field: self._value}) if type(config) is self._cls else config

    def train(self, state, opt, *args, **fields):
        if self._cls is TrainConfig:
            fields |= {self._field: self._value}
            if self._field == "compute_dtype":
                fields.pop(self._field)
                self._side.dtype = self._value
        return self._side.train(state, self._replace(opt), *args, **fields)

    def stream(self, weights, prompts, n_new, cfg, *args):
        return self._side.stream(weights, prompts, n_new, self._replace(cfg), *args)


def with_shadow(number: int, cls: type, field: str, value: Any) -> Callable:
    def sides(self, dtype: str, cfg: ModelConfig | None = None):
        cfg = cfg or self.cfg
        other = dataclasses.replace(cfg, **{field: value}) if cls is ModelConfig else cfg
        pair: list[Any] = []
        for i, side in enumerate((JaxSide, TorchSide)):
            mine = side(other if i == number else cfg, dtype)
            pair.append(Shadowed(mine, cls, field, value) if i == number else mine)
        return tuple(pair)

    return sides


CASES = [(cls, field, *case) for cls, fields in NUMBERS.items() for field, case in fields.items()]


@pytest.mark.parametrize(("cls", "field", "line", "value"), CASES, ids=[f"{c.__name__}.{f}" for c, f, *_ in CASES])
def test_a_field_that_decides_numbers_is_red_where_it_is_dropped(cls, field, line, value, monkeypatch):
    one, settings = Drawn.parse(line), Settings()
    row = judge(settings, one)
    assert row.ok, row
    for number, name in enumerate(("JAX", "torch")):
        monkeypatch.setattr(Settings, "sides", with_shadow(number, cls, field, value))
        row = judge(settings, one)
        monkeypatch.undo()
        assert not row.ok, f"{name} without {field}: nothing is red"
        assert row.side == name, row


# --- execution: what a program is made of


def jax_program(recipe: Recipe) -> dict[str, int]:
    """How often each primitive stands in the step of a run, and the largest array with the vocabulary's size."""

    cfg, train, opt = recipe.model, recipe.train, recipe.optimizer
    state = init_state(recipe)
    inputs = np.zeros((train.batch_size, train.seq_len), np.int32)
    step = compiled_train_step.__wrapped__(with_execution(recipe, compile="off"), "cpu")
    either = tuple(step_scalars(opt, 0, n) for n in (0, 1))
    found: dict[str, int] = {"largest logits": 0}

    for equation in equations(jax.make_jaxpr(step)(state, inputs, inputs, either, 0).jaxpr):
        found[equation.primitive.name] = found.get(equation.primitive.name, 0) + 1
        if equation.primitive.name == "scan":
            key = f"scan of {equation.params['length']}"
            found[key] = found.get(key, 0) + 1
        for v in equation.outvars:
            shape = getattr(v.aval, "shape", ())
            if len(shape) > 1 and shape[-1] == cfg.vocab_size:
                found["largest logits"] = max(found["largest logits"], int(np.prod(shape)))
    return found


def torch_program(recipe: Recipe) -> dict[str, int]:
    """The same of torch: operators that one step runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    cfg, train, found = recipe.model, recipe.train, {"largest logits": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = str(func.overloadpacket)
            found[name] = found.get(name, 0) + 1
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == cfg.vocab_size:
                    found["largest logits"] = max(found["largest logits"], x.numel())
            return out

    trainer = Trainer(recipe)
    inputs = torch.zeros(train.batch_size, train.seq_len, dtype=torch.long)
    with Count():
        trainer.train_step(inputs, inputs)
    return found


BASE = Recipe(
    preset("tiny"),
    TrainConfig(batch_size=4, seq_len=8),
    execution=ExecutionConfig(attention_backend="reference"),
)


def with_execution(recipe: Recipe, **fields) -> Recipe:
    return dataclasses.replace(recipe, execution=dataclasses.replace(recipe.execution, **fields))


def changed(**fields) -> tuple[dict, dict, dict, dict]:
    other = with_execution(BASE, **fields)
    return jax_program(BASE), jax_program(other), torch_program(BASE), torch_program(other)


def test_accumulation_runs_micro_batches():
    before, after, torch_before, torch_after = changed(gradient_accumulation_steps=4)
    assert (before.get("scan of 4", 0), after.get("scan of 4", 0)) == (0, 1)
    assert torch_after["aten.embedding"] == 4 * torch_before["aten.embedding"]


def test_chunks_never_make_all_logits():
    before, after, torch_before, torch_after = changed(loss_chunks=4)
    whole = BASE.train.batch_size * BASE.train.seq_len * preset("tiny").vocab_size
    assert before["largest logits"] == torch_before["largest logits"] == whole
    table = preset("tiny").vocab_size * preset("tiny").hidden_size  # a gradient of the head may have that shape
    assert after["largest logits"] <= max(whole // 4, table)
    assert torch_after["largest logits"] <= max(whole // 4, table)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_computes_again(remat):
    before, after, torch_before, torch_after = changed(remat=remat)
    more = {"dots": "aten.rsqrt", "full": "aten.mm"}[remat]
    assert torch_after[more] > torch_before[more]
    assert after["rsqrt" if remat == "dots" else "dot_general"] > before["rsqrt" if remat == "dots" else "dot_general"]
    if remat == "dots":
        assert torch_after["aten.mm"] == torch_before["aten.mm"]


def test_scanned_layers_are_one_scan():
    before, after, torch_before, torch_after = changed(scan_layers=True)
    layers = preset("tiny").num_hidden_layers
    assert before.get(f"scan of {layers}", 0) == 0 < after[f"scan of {layers}"]
    assert torch_after == torch_before  # PyTorch has one form of its layers


def test_compile_decides_whether_a_step_is_compiled():
    for value, compiled in (("on", True), ("off", False)):
        recipe = with_execution(BASE, compile=value)
        assert hasattr(compiled_train_step(recipe, "cpu"), "lower") == compiled
        if value == "off":
            assert not Trainer(recipe).compiled
    assert Trainer(with_execution(BASE, compile="on")).compiled


def test_deterministic_is_on_while_a_step_runs(monkeypatch):
    seen = []
    original = Trainer.loss_and_grads

    def spy(self, *args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(self, *args)

    monkeypatch.setattr(Trainer, "loss_and_grads", spy)
    inputs = torch.zeros(4, 8, dtype=torch.long)
    for value in (False, True):
        Trainer(with_execution(BASE, deterministic=value)).train_step(inputs, inputs)
    assert seen == [False, True]
    options = []
    monkeypatch.setattr(jax, "jit", lambda f, **kwargs: options.append(kwargs["compiler_options"]) or f)
    for value in (False, True):
        compiled_train_step.__wrapped__(with_execution(BASE, deterministic=value), "gpu")
    assert options == [None, {"xla_gpu_deterministic_ops": True}]


def test_the_attention_backend_reaches_the_model():
    for value in ("reference", "fused"):
        recipe = with_execution(BASE, attention_backend=value)
        model = make_model(recipe, "cpu")
        module = Trainer(recipe).model
        for kernels, plain in ((model.kernels, jax_llm.model.PLAIN), (module.kernels, torch_llm.model.PLAIN)):
            assert (kernels.attention == plain.attention) == (value == "reference")


def test_updates_skipped_in_a_row_end_a_run_after_as_many_as_it_says():
    cfg = preset("tiny")
    weights = random_weights(cfg, 0)
    weights["model.norm.weight"][0] = np.nan
    data = RandomBatches(cfg, 0)
    for n in (1, 3):
        for side in (JaxSide(cfg, "float64"), TorchSide(cfg, "float64")):
            with pytest.raises(UserError, match=f"in {n} steps in a row \\(to step {n}\\)"):
                side.train(start_state(weights), OptimizerConfig(), data, 9, max_skipped_steps=n)
        state = (weights, weights, weights, 0, 0)
        with pytest.raises(ArithmeticError, match=f"to step {n}"):
            spec_run.train(state, data.batch, 9, cfg, OptimizerConfig(), max_skipped=n)


EXECUTION: dict[type, dict[str, Callable]] = {
    ExecutionConfig: {
        "gradient_accumulation_steps": test_accumulation_runs_micro_batches,
        "loss_chunks": test_chunks_never_make_all_logits,
        "remat": test_rematerialisation_computes_again,
        "scan_layers": test_scanned_layers_are_one_scan,
        "compile": test_compile_decides_whether_a_step_is_compiled,
        "deterministic": test_deterministic_is_on_while_a_step_runs,
        "attention_backend": test_the_attention_backend_reaches_the_model,
    },
    TrainConfig: {
        "max_skipped_steps": test_updates_skipped_in_a_row_end_a_run_after_as_many_as_it_says,
    },
}
CONFIGS = (
    ModelConfig,
    RopeScaling,
    OptimizerConfig,
    TrainConfig,
    ExecutionConfig,
    RunConfig,
    SamplingConfig,
    MeshConfig,
)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_is_declared_once(cls):
    for field in dataclasses.fields(cls):
        kinds = [
            name
            for name, table in (("numbers", NUMBERS), ("execution", EXECUTION), ("bookkeeping", BOOKKEEPING))
            if field.name in table.get(cls, {})
        ]
        assert len(kinds) == 1, f"{cls.__name__}.{field.name} is declared {kinds}: numbers, execution or bookkeeping?"
    declared = {name for table in (NUMBERS, EXECUTION, BOOKKEEPING) for name in table.get(cls, {})}
    assert declared == {field.name for field in dataclasses.fields(cls)}


def test_bookkeeping_has_its_tests():
    root = Path(__file__).parents[2]
    for cls, fields in BOOKKEEPING.items():
        for field, (file, word) in fields.items():
            text = (root / file).read_text(encoding="utf-8")
            assert (word or field) in text, f"{cls.__name__}.{field}: {file} does not speak of it"


def test_every_kernel_of_the_fast_packages_has_a_row():
    """Each field of `Kernels` is declared, and each replacement that `fast/` offers is judged against the plain
    function.
    """
    judged = {JAX: set(), TORCH: set()}
    for one in kernel_checks.replacements(13):
        judged[one.side] |= {
            (field, getattr(kernel, "__name__", type(kernel).__name__)) for field, kernel in one.kernels.items()
        }
    for side, make, settings in (
        (
            JAX,
            jax_llm.fast.kernels.make_kernels,
            ({"attention": "xla"}, {"fused_projections": True}, {"attention": "cudnn"}),
        ),
        (TORCH, torch_llm.fast.kernels.make_kernels, ({"attention": "sdpa"},)),
    ):
        plain = {JAX: jax_llm.model, TORCH: torch_llm.model}[side].PLAIN
        given = set()
        for more in (*settings, {"remat": "full"}, {"loss_chunks": 2}):
            kernels = make(**more)
            for field in dataclasses.fields(kernels):
                kernel = getattr(kernels, field.name)
                if kernel != getattr(plain, field.name):
                    given.add((field.name, getattr(kernel, "__name__", type(kernel).__name__)))
        assert given <= judged[side], given - judged[side]


def test_the_two_sides_have_the_same_kernels():
    fields = [[f.name for f in dataclasses.fields(side.PLAIN)] for side in (jax_llm.model, torch_llm.model)]
    assert [name.removesuffix("s") for name in fields[0]] == [name.removesuffix("s") for name in fields[1]]
