"""The torch side behind the interface that every check uses: canonical float64 arrays in, float64 arrays out.

The twin is `parity/sides/jax_side.py`. Each method goes through the code that a user runs.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import torch_llm.engine.train
from llm_common.config import ModelConfig, OptimizerConfig, Recipe, SamplingConfig, Separator, TrainConfig
from llm_common.data.evaluation import Evaluation
from llm_common.run.checkpoint import TrainingState
from llm_common.tensors import decays
from llm_common.text.drawn_texts import join
from parity.core.compare import Tensors
from parity.sides.as_written import without_compiler
from parity.sides.taps import TorchRecorder, Values
from torch_llm import random_bits, sampling
from torch_llm.engine import checkpoint
from torch_llm.engine.backend import BACKEND
from torch_llm.engine.decoding import GraphCache, fuse_projections
from torch_llm.engine.device import matmul_precision, select_device
from torch_llm.engine.generate import generate, generate_stream
from torch_llm.engine.gradients import loss_and_grads
from torch_llm.engine.train import Trainer
from torch_llm.fast.attention import resolve_backend
from torch_llm.fast.kernels import make_kernels
from torch_llm.kernels import Kernels
from torch_llm.kv_cache import KVCache
from torch_llm.loss import IGNORE_INDEX
from torch_llm.model import CausalLM, empty_model, init_model
from torch_llm.optim import gradient, make_optimizer


class TorchSide:
    name = "torch"

    def __init__(self, cfg: ModelConfig, dtype: str, device: str = "cpu", attention: str = "reference") -> None:
        self.cfg, self.dtype, self.device, self.attention = cfg, dtype, select_device(device), attention
        self.master = "float64" if dtype == "float64" else "float32"
        self.backend = resolve_backend(attention, dtype)

    remat, separator = "none", None
    tf32 = False  # float32 products in TF32 where the device has it

    def scope(self):
        """float32 products in full precision."""
        return matmul_precision("bfloat16" if self.tf32 else self.dtype)

    def variant(self, remat: str = "none", separator: Separator = None) -> "TorchSide":
        """The same with another `remat` or `separator`."""
        other = TorchSide(self.cfg, self.dtype, str(self.device), self.attention)
        other.remat, other.separator = remat, separator
        return other

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, device=self.device)

    def _model(self, weights: Tensors, dtype: str | None = None, loss_chunks: int = 1) -> CausalLM:
        kernels = make_kernels(self.backend, self.remat, loss_chunks, self.separator)
        model = empty_model(self.cfg, getattr(torch, dtype or self.dtype), self.device, kernels)
        return checkpoint.from_canonical(model, weights)

    def _recipe(self, opt: OptimizerConfig | None = None, **fields) -> Recipe:
        fields = {"compute_dtype": self.dtype, "attention_backend": self.attention, **fields}
        return Recipe.from_settings(self.cfg, fields, opt)

    def initial_weights(self, seed: int) -> Tensors:
        recipe = Recipe(self.cfg, TrainConfig(seed=seed, compute_dtype=self.dtype, seq_len=1))
        return _float64(checkpoint.to_training_state(Trainer(recipe, self.device)).weights)

    def initial_model(self, seed: int) -> Tensors:
        """The initial weights as a model computes with them: rounded to its dtype, not the masters."""
        model = init_model(self.cfg, seed, getattr(torch, self.dtype), self.device)
        return {name: p.detach().double().cpu().numpy() for name, p in model.named_parameters()}

    def logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad(), self.scope():
            return self._model(weights)(self._tensor(ids)).double().cpu().numpy()

    uncompiled_logits = logits

    def compiled_logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        """The logits through torch.compile."""
        with torch.no_grad(), self.scope():
            return torch.compile(self._model(weights))(self._tensor(ids)).double().cpu().numpy()

    def cached_logits(self, weights: Tensors, ids: np.ndarray, prompt: int, fused: bool = False) -> np.ndarray:
        """The logits of ids (B, T) fed in pieces: the first `prompt` positions, then two, then one by one.

        fused: with weights as the generator takes them.
        """
        model = fuse_projections(self._model(weights)) if fused else self._model(weights)
        cache = KVCache(self.cfg, ids.shape[0], ids.shape[1], getattr(torch, self.dtype), self.device)
        pieces = np.split(ids, [prompt, *range(prompt + 2, ids.shape[1])], axis=1)
        with torch.no_grad(), self.scope():
            return np.concatenate(
                [model(self._tensor(piece), cache).double().cpu().numpy() for piece in pieces], axis=1
            )

    def loss_and_grads(
        self,
        weights: Tensors,
        ids: np.ndarray,
        targets: np.ndarray,
        accumulation_steps: int = 1,
        loss_chunks: int = 1,
    ) -> tuple[float, Tensors]:
        model = self._model(weights, loss_chunks=loss_chunks)
        with self.scope():
            batch = self._tensor(ids), self._tensor(targets)
            loss = loss_and_grads(model, *batch, accumulation_steps)
        return float(loss), self._gradients(model)

    def results(
        self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, kernels: Kernels, fused: bool = False
    ) -> Tensors:
        """Logits, loss and gradients with these kernels. fused: logits alone, of weights that lie side by side."""
        model = empty_model(self.cfg, getattr(torch, self.dtype), self.device, kernels)
        model = checkpoint.from_canonical(model, weights)
        with self.scope():
            inputs, labels = self._tensor(ids), self._tensor(targets)
            with torch.no_grad():
                logits = (fuse_projections(model) if fused else model)(inputs)
            found = {"logits": logits.double().cpu().numpy()}
            if not fused:
                loss = loss_and_grads(model, inputs, labels)
                found |= {"loss": loss.double().cpu().numpy(), **self._gradients(model)}
            return found

    def tapped(self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, given: Values, given_back: Values):
        """One loss and its gradients under taps: what they recorded, the loss, the gradients."""
        recorder, model = TorchRecorder(given, given_back), self._model(weights)
        with self.scope(), recorder.attached(model):
            loss = loss_and_grads(model, self._tensor(ids), self._tensor(targets))
        return recorder, float(loss), self._gradients(model)

    def _gradients(self, model: CausalLM) -> Tensors:
        """The gradients left in a model; zero where there is none."""
        return {name: gradient(p).double().cpu().numpy() for name, p in model.named_parameters()}

    def tapped_cache(self, weights: Tensors, ids: np.ndarray, prompt: int, values: Callable[[int, int], Values]):
        """What taps record while ids are fed as `cached_logits` feeds them: recorder, first and last position."""
        model, start = self._model(weights), 0
        cache = KVCache(self.cfg, ids.shape[0], ids.shape[1], getattr(torch, self.dtype), self.device)
        for piece in np.split(ids, [prompt, *range(prompt + 2, ids.shape[1])], axis=1):
            end = start + piece.shape[1]
            recorder = TorchRecorder(values(start, end))
            with torch.no_grad(), self.scope(), recorder.attached(model):
                model(self._tensor(piece), cache)
            yield recorder, start, end
            start = end

    @contextlib.contextmanager
    def given_gradients(self, loss: float, grads: Tensors):
        """While this is open, `train` finds these where it computes loss and gradients."""

        def stand_in(model, *_):
            for name, p in model.named_parameters():
                p.grad = self._tensor(grads[name]).to(p.dtype)
            return torch.tensor(loss, dtype=getattr(torch, self.master))

        with mock.patch.object(torch_llm.engine.train, "loss_and_grads", stand_in):
            yield

    def train(
        self,
        state: TrainingState,
        opt: OptimizerConfig,
        dataset,
        until_step: int,
        on_step: Callable[[int, Callable[[], TrainingState], Mapping[str, Any]], None] | None = None,
        **fields,
    ) -> TrainingState:
        """Run `Trainer.fit`; `on_step` gets the step, a function that reads the state, and the step's metrics.

        fields: of `Recipe.from_settings`. A compiled run on a CPU is one without the compiler."""

        def hook(step, trainer, metrics):
            if on_step is not None:
                on_step(step, lambda: checkpoint.to_training_state(trainer), metrics)

        with without_compiler(self.device.type):
            trainer = self.trainer(state, opt, dataset, **fields)
            trainer.fit(dataset, until_step, hook)
        return checkpoint.to_training_state(trainer)

    def trainer(self, state: TrainingState, opt: OptimizerConfig, dataset, **fields) -> Trainer:
        """A trainer that goes on from a state. fields: of `Recipe.from_settings`."""
        recipe = self._recipe(opt, **{"seq_len": dataset.batch(state.step)[0].shape[1], **fields})
        return checkpoint.from_training_state(Trainer(recipe, self.device, init_weights=False), state)

    def evaluate(self, weights: Tensors, evaluation: Evaluation, **fields) -> tuple[float, int]:
        """Sum of the held-out losses in nats, and the number of tokens. fields: of `Recipe.from_settings`."""
        recipe = self._recipe(seq_len=evaluation.seq_len, **fields)
        with BACKEND.evaluator(recipe, weights, str(self.device), None) as evaluate:
            return evaluate(evaluation)

    def adamw(
        self, weights: Tensors, grads: list[Tensors], opt: OptimizerConfig, keep: tuple[int, ...], library: bool
    ) -> dict[int, Tensors]:
        """The weights after the updates numbered in `keep`, from given gradients at lr_max; no clipping.

        library: by `torch.optim.AdamW` instead of ours.
        """
        model = self._model(weights, self.master)
        optimizer = make_optimizer(opt, model)
        if library:
            groups = [
                {"params": [p for p in model.parameters() if decays(p.shape) is flag], "weight_decay": decay}
                for flag, decay in ((True, opt.weight_decay), (False, 0.0))
            ]
            optimizer = torch.optim.AdamW(groups, lr=opt.lr_max, betas=(opt.beta1, opt.beta2), eps=opt.eps)
        kept = {}
        for n, g in enumerate(grads, start=1):
            for name, p in model.named_parameters():
                p.grad = self._tensor(g[name]).to(p.dtype)
            optimizer.step()
            if n in keep:
                kept[n] = _float64(checkpoint.to_canonical(model))
        return kept

    def optimize(self, params: Tensors, grads: list[Tensors], opt: OptimizerConfig) -> Tensors:
        """Any parameters after updates at lr_max, by our AdamW alone; what has no gradient has none."""
        module = nn.ParameterDict({name: nn.Parameter(self._tensor(np.array(x))) for name, x in params.items()})
        optimizer = make_optimizer(opt, module)
        for g in grads:
            for name, p in module.items():
                p.grad = self._tensor(g[name]) if name in g else None
            optimizer.step()
        return {name: p.detach().cpu().numpy() for name, p in module.items()}

    def scaled_gradients(
        self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, scale: float, chunks: int
    ) -> Tensors:
        """The gradients of `scale` times the loss, over `scale`."""
        model, batch = self._model(weights, loss_chunks=chunks), (self._tensor(ids), self._tensor(targets))
        (scale * model.kernels.loss(model, *batch, (batch[1] != IGNORE_INDEX).sum())).backward()
        return {name: x / scale for name, x in self._gradients(model).items()}

    def converted_logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        """The logits of a model that has computed in float32 before."""
        model, inputs = self._model(weights, "float32"), self._tensor(ids)
        with torch.no_grad():
            model(inputs)
            model = checkpoint.from_canonical(model.to(getattr(torch, self.dtype)), weights)
            return model(inputs).double().cpu().numpy()

    def sample(self, logits: np.ndarray, cfg: SamplingConfig, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Tokens for logits (n, V), which come in this side's dtype."""
        tensor, key = self._tensor(logits).to(getattr(torch, self.dtype)), random_bits.key(cfg.seed, self.device)
        return sampling.sample(tensor, cfg, key, self._tensor(rows), self._tensor(positions)).cpu().numpy()

    def filtered(self, logits: np.ndarray, cfg: SamplingConfig) -> np.ndarray:
        """Logits (n, V) over the temperature, the excluded tokens at -inf."""
        tensor = self._tensor(logits).to(getattr(torch, self.dtype))
        return sampling.filter_logits(tensor, cfg).double().cpu().numpy()

    def random(self, seed: int, folded: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n random words of a seed's key with an integer folded in, and the uniform numbers that they give."""
        bits = random_bits.random_bits(random_bits.fold_in(random_bits.key(seed, self.device), folded), n)
        uniform = random_bits.uniform(bits, getattr(torch, self.master))
        return bits.cpu().numpy().astype(np.uint64), uniform.double().cpu().numpy()

    def noise(self, seed: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The Gumbel noise (n, V) of some draws."""
        args = random_bits.key(seed, self.device), self._tensor(rows), self._tensor(positions)
        return sampling.gumbel_noise(*args, self.cfg.vocab_size, getattr(torch, self.master)).double().cpu().numpy()

    def stream(
        self,
        weights: Tensors,
        prompts,
        n_new: int,
        cfg: SamplingConfig,
        eos_ids=(),
        numbers=None,
        chunk: int = 16,
        finished: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Whole texts from the generator of the `Backend` that the scripts call."""
        with BACKEND.generator(self.cfg, weights, self.dtype, str(self.device), None, "auto") as stream:
            return join(stream(prompts, n_new, cfg, eos_ids, numbers, finished, chunk=chunk), len(prompts))

    def generate(
        self,
        weights: Tensors,
        prompts,
        n_new: int,
        cfg: SamplingConfig,
        eos_ids: tuple[int, ...] = (),
        finished: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        with self.scope():
            return generate(self._model(weights), prompts, n_new, cfg, eos_ids, finished=finished)

    def captured(
        self, weights: Tensors, prompts, n_new: int, cfg: SamplingConfig, eos_ids: tuple[int, ...], programs: GraphCache
    ) -> list[list[int]]:
        """The same from steps that are captured once and played again, as on a GPU; on a CPU, one by one."""
        with self.scope():
            stream = generate_stream(self._model(weights), prompts, n_new, cfg, eos_ids, programs=programs)
            return join(stream, len(prompts))


def _float64(tensors: Tensors) -> Tensors:
    return {name: x.astype(np.float64) for name, x in tensors.items()}
