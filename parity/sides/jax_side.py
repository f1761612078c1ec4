"""The JAX side behind the interface that every check uses: canonical float64 arrays in, float64 arrays out.

The twin is `parity/sides/torch_side.py`. Each method goes through the code that a user runs.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_llm.engine.train
from jax_llm import optim, random_bits, sampling
from jax_llm.engine import checkpoint
from jax_llm.engine.backend import BACKEND
from jax_llm.engine.decoding import decoding_params
from jax_llm.engine.device import matmul_precision, select_device
from jax_llm.engine.generate import generate
from jax_llm.engine.gradients import cast, loss_and_grads
from jax_llm.engine.train import compiled_train_step, fit, init_state
from jax_llm.fast.attention import resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.kernels import Kernels
from jax_llm.kv_cache import init_cache
from jax_llm.loss import IGNORE_INDEX
from jax_llm.model import CausalLM, init_params
from llm_common.config import ModelConfig, OptimizerConfig, Recipe, SamplingConfig, TrainConfig
from llm_common.data.evaluation import Evaluation
from llm_common.run.checkpoint import TrainingState
from llm_common.schedule import StepScalars, bias_corrections
from llm_common.text.drawn_texts import join
from parity.core.compare import Tensors
from parity.sides.taps import JaxRecorder, Values


def clear_caches() -> None:
    """Forget every compiled program: a jitted function keeps the Python it was traced from."""
    jax.clear_caches()
    compiled_train_step.cache_clear()


def clear_train_step() -> None:
    """Forget the training steps that were built: they hold the functions of which they were made."""
    compiled_train_step.cache_clear()


class JaxSide:
    name = "JAX"

    def __init__(self, cfg: ModelConfig, dtype: str, device: str = "cpu", attention: str = "reference") -> None:
        self.cfg, self.dtype, self.device, self.attention = cfg, dtype, select_device(device), attention
        self.master = "float64" if dtype == "float64" else "float32"
        self.fields: dict[str, Any] = {}  # of the model, beside config and backend
        self._logits = jax.jit(lambda params, ids: self._model(ids).apply({"params": params}, ids)[0])
        cached = lambda params, ids, cache, fused: self._model(ids, fused_projections=fused).apply(
            {"params": params}, ids, cache
        )
        self._cached = jax.jit(cached, static_argnums=3)
        grads = lambda params, ids, targets, steps, chunks: loss_and_grads(
            self._model(ids, loss_chunks=chunks), params, ids, targets, steps
        )
        self._grads = jax.jit(grads, static_argnums=(3, 4))

    def variant(self, **fields) -> "JaxSide":
        """The same with another `remat`, `scan_layers` or `separator`."""
        other = JaxSide(self.cfg, self.dtype, self.device.platform, self.attention)
        other.fields = fields
        return other

    def _model(self, ids, **fields) -> CausalLM:
        backend = resolve_backend(self.attention, self.device.platform, self.dtype, self.cfg, ids.shape[1])
        return CausalLM(self.cfg, make_kernels(backend, **(self.fields | fields)))

    tf32 = False  # float32 products in TF32 where the device has it; a jitted function is traced anew for it

    @contextlib.contextmanager
    def scope(self):
        """x64 on for float64 and off, asserted, for the rest; float32 products in full precision."""
        precision = jax.default_matmul_precision("tensorfloat32") if self.tf32 else matmul_precision(self.dtype)
        with jax.enable_x64(self.dtype == "float64"), precision, jax.default_device(self.device):
            assert jnp.zeros(()).dtype == (jnp.float64 if self.dtype == "float64" else jnp.float32)
            yield

    def _params(self, weights: Tensors, dtype: str | None = None):
        return checkpoint.from_canonical(self.cfg, weights, jnp.dtype(dtype or self.dtype))

    def _tensors(self, tree) -> Tensors:
        return {name: x.astype(np.float64) for name, x in checkpoint.to_canonical(self.cfg, tree).items()}

    def _recipe(self, opt: OptimizerConfig | None = None, **fields) -> Recipe:
        fields = {"compute_dtype": self.dtype, "attention_backend": self.attention, **fields}
        return Recipe.from_settings(self.cfg, fields, opt)

    def initial_weights(self, seed: int) -> Tensors:
        with self.scope():
            recipe = Recipe(self.cfg, TrainConfig(seed=seed, compute_dtype=self.dtype, seq_len=1))
            return self._tensors(init_state(recipe).params)

    def initial_model(self, seed: int) -> Tensors:
        """The initial weights as a model computes with them: rounded to its dtype, not the masters."""
        with self.scope():
            return self._tensors(cast(init_params(self.cfg, seed), jnp.dtype(self.dtype)))

    def logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        with self.scope():
            return np.asarray(self._logits(self._params(weights), jnp.array(ids))).astype(np.float64)

    def cached_logits(self, weights: Tensors, ids: np.ndarray, prompt: int, fused: bool = False) -> np.ndarray:
        """The logits of ids (B, T) fed in pieces: the first `prompt` positions, then two, then one by one.

        fused: with weights as the generator takes them.
        """
        with self.scope():
            params = self._params(weights)
            params = decoding_params(params) if fused else params
            cache = init_cache(self.cfg, ids.shape[0], ids.shape[1], jnp.dtype(self.dtype))
            parts = []
            for piece in np.split(ids, [prompt, *range(prompt + 2, ids.shape[1])], axis=1):
                logits, cache = self._cached(params, jnp.array(piece), cache, fused)
                parts.append(np.asarray(logits).astype(np.float64))
            return np.concatenate(parts, axis=1)

    def loss_and_grads(
        self,
        weights: Tensors,
        ids: np.ndarray,
        targets: np.ndarray,
        accumulation_steps: int = 1,
        loss_chunks: int = 1,
    ) -> tuple[float, Tensors]:
        with self.scope():
            batch = jnp.array(ids), jnp.array(targets)
            loss, grads = self._grads(self._params(weights), *batch, accumulation_steps, loss_chunks)
            return float(loss), self._tensors(grads)

    def results(
        self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, kernels: Kernels, fused: bool = False
    ) -> Tensors:
        """Logits, loss and gradients with these kernels. fused: logits alone, of weights that lie side by side."""
        with self.scope():
            model, params, batch = (
                CausalLM(self.cfg, kernels),
                self._params(weights),
                (jnp.array(ids), jnp.array(targets)),
            )
            own = decoding_params(params) if fused else params
            logits = jax.jit(lambda params, ids: model.apply({"params": params}, ids)[0])(own, batch[0])
            found = {"logits": np.asarray(logits).astype(np.float64)}
            if not fused:
                loss, grads = jax.jit(lambda *args: loss_and_grads(model, *args))(params, *batch)
                found |= {"loss": np.asarray(loss).astype(np.float64), **self._tensors(grads)}
            return found

    def uncompiled_logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        """The logits, operation by operation."""
        with self.scope():
            logits, _ = self._model(ids).apply({"params": self._params(weights)}, jnp.array(ids))  # type: ignore[misc]
            return np.asarray(logits).astype(np.float64)

    def unoptimised_gradients(self, weights: Tensors, ids: np.ndarray, targets: np.ndarray) -> Tensors:
        """The gradients of a program that the compiler did not optimise."""
        with self.scope():
            args = self._params(weights), jnp.array(ids), jnp.array(targets)
            function = lambda params, ids, targets: loss_and_grads(self._model(ids), params, ids, targets)[1]
            return self._tensors(jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*args))

    def tapped(self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, given: Values, given_back: Values):
        """One loss and its gradients under taps, uncompiled: what they recorded, the loss, the gradients."""
        recorder = JaxRecorder(given, given_back)
        with self.scope(), recorder.attached():
            args = self._params(weights), jnp.array(ids), jnp.array(targets)
            loss, grads = loss_and_grads(recorder.of(self._model(ids)), *args)
            return recorder, float(loss), self._tensors(grads)

    def tapped_cache(self, weights: Tensors, ids: np.ndarray, prompt: int, values: Callable[[int, int], Values]):
        """What taps record while ids are fed as `cached_logits` feeds them: recorder, first and last position."""
        with self.scope():
            params = self._params(weights)
            cache = init_cache(self.cfg, ids.shape[0], ids.shape[1], jnp.dtype(self.dtype))
            start = 0
            for piece in np.split(ids, [prompt, *range(prompt + 2, ids.shape[1])], axis=1):
                end = start + piece.shape[1]
                recorder = JaxRecorder(values(start, end))
                with recorder.attached():
                    model = recorder.of(self._model(ids))
                    _, cache = model.apply({"params": params}, jnp.array(piece), cache)
                yield recorder, start, end
                start = end

    @contextlib.contextmanager
    def given_gradients(self, loss: float, grads: Tensors):
        """While this is open, `train` finds these where it computes loss and gradients; uncompiled."""

        def stand_in(model, params, *_):
            given = self._params(grads, self.dtype)
            return jnp.array(loss, jnp.dtype(self.master)), given

        with jax.disable_jit(), mock.patch.object(jax_llm.engine.train, "loss_and_grads", stand_in):
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
        """Run `fit`; `on_step` gets the step, a function that reads the state, and the step's metrics.

        fields: of `Recipe.from_settings`."""
        recipe = self._recipe(opt, **{"seq_len": dataset.batch(state.step)[0].shape[1], **fields})

        def hook(step, state, metrics):
            if on_step is not None:
                on_step(step, lambda: checkpoint.to_training_state(self.cfg, state), metrics)

        with self.scope():
            jax_state = checkpoint.from_training_state(self.cfg, opt, state, jnp.dtype(self.master))
            jax_state = fit(jax_state, recipe, dataset, until_step, hook)
            return checkpoint.to_training_state(self.cfg, jax_state)

    def evaluate(self, weights: Tensors, evaluation: Evaluation, **fields) -> tuple[float, int]:
        """Sum of the held-out losses in nats, and the number of tokens. fields: of `Recipe.from_settings`."""
        recipe = self._recipe(seq_len=evaluation.seq_len, **fields)
        with self.scope(), BACKEND.evaluator(recipe, weights, self.device.platform, None) as evaluate:
            return evaluate(evaluation)

    def adamw(
        self, weights: Tensors, grads: list[Tensors], opt: OptimizerConfig, keep: tuple[int, ...], library: bool
    ) -> dict[int, Tensors]:
        """The weights after the updates numbered in `keep`, from given gradients at lr_max; no clipping.

        library: by `optax.adamw` instead of ours.
        """
        with self.scope():
            mask = optim.decay_mask(self.cfg)
            optimizer = optim.adamw(opt.beta1, opt.beta2, opt.eps, opt.weight_decay, mask)
            if library:
                optimizer = optax.adamw(
                    opt.lr_max, opt.beta1, opt.beta2, opt.eps, weight_decay=opt.weight_decay, mask=mask
                )
            optimizer = optax.with_extra_args_support(optimizer)

            @jax.jit
            def step(params, state, grads, scalars):
                updates, state = optimizer.update(grads, state, params, scalars=scalars)
                return optax.apply_updates(params, updates), state

            params = self._params(weights, self.master)
            state, kept = optimizer.init(params), {}
            for n, g in enumerate(grads, start=1):
                scalars = StepScalars(opt.lr_max, *bias_corrections(opt.beta1, opt.beta2, n))
                params, state = step(params, state, self._params(g, self.master), scalars)
                if n in keep:
                    kept[n] = self._tensors(params)
            return kept

    def optimize(self, params: Tensors, grads: list[Tensors], opt: OptimizerConfig) -> Tensors:
        """Any parameters after updates at lr_max, by our AdamW alone; what has no gradient has a zero one."""
        with self.scope():
            optimizer = optim.adamw(opt.beta1, opt.beta2, opt.eps, opt.weight_decay)
            tree: Any = {name: jnp.array(x, self.master) for name, x in params.items()}
            state = optimizer.init(tree)
            for n, g in enumerate(grads, start=1):
                given = {
                    name: jnp.array(g[name], p.dtype) if name in g else jnp.zeros_like(p) for name, p in tree.items()
                }
                scalars = StepScalars(opt.lr_max, *bias_corrections(opt.beta1, opt.beta2, n))
                updates, state = optimizer.update(given, state, tree, scalars=scalars)
                tree = optax.apply_updates(tree, updates)
            return {name: np.array(x) for name, x in tree.items()}

    def scaled_gradients(
        self, weights: Tensors, ids: np.ndarray, targets: np.ndarray, scale: float, chunks: int
    ) -> Tensors:
        """The gradients of `scale` times the loss, over `scale`."""
        with self.scope():
            model, batch = self._model(ids, loss_chunks=chunks), (jnp.array(ids), jnp.array(targets))
            count = (batch[1] != IGNORE_INDEX).sum()
            loss = lambda params: scale * model.kernels.loss(model, params, *batch, count)
            grads = jax.jit(jax.grad(loss))(self._params(weights))
            return {name: x / scale for name, x in self._tensors(grads).items()}

    def converted_logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        """The logits of a model that has computed in float32 before."""
        with self.scope():
            model, inputs = self._model(ids), jnp.array(ids)
            for dtype in ("float32", self.dtype):
                logits, _ = model.apply({"params": self._params(weights, dtype)}, inputs)  # type: ignore[misc]
            return np.asarray(logits).astype(np.float64)

    def sample(self, logits: np.ndarray, cfg: SamplingConfig, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Tokens for logits (n, V), which come in this side's dtype."""
        with self.scope():
            key = random_bits.key(cfg.seed)
            draw = jax.jit(lambda *args: sampling.sample(args[0], cfg, *args[1:]))
            return np.asarray(
                draw(jnp.array(logits, jnp.dtype(self.dtype)), key, jnp.array(rows), jnp.array(positions))
            )

    def filtered(self, logits: np.ndarray, cfg: SamplingConfig) -> np.ndarray:
        """Logits (n, V) over the temperature, the excluded tokens at -inf."""
        with self.scope():
            return np.asarray(sampling.filter_logits(jnp.array(logits, jnp.dtype(self.dtype)), cfg), np.float64)

    def random(self, seed: int, folded: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n random words of a seed's key with an integer folded in, and the uniform numbers that they give."""
        with self.scope():
            bits = random_bits.random_bits(random_bits.fold_in(random_bits.key(seed), folded), n)
            uniform = random_bits.uniform(bits, jnp.dtype(self.master))
            return np.asarray(bits, np.uint64), np.asarray(uniform).astype(np.float64)

    def noise(self, seed: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The Gumbel noise (n, V) of some draws."""
        with self.scope():
            dtype = jnp.dtype(self.master)
            args = random_bits.key(seed), jnp.array(rows), jnp.array(positions)
            return np.asarray(sampling.gumbel_noise(*args, self.cfg.vocab_size, dtype)).astype(np.float64)

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
        device = self.device.platform
        with self.scope(), BACKEND.generator(self.cfg, weights, self.dtype, device, None, "auto") as stream:
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
            backend = resolve_backend(self.attention, self.device.platform, self.dtype, self.cfg, seq_len=0)
            return generate(
                CausalLM(self.cfg, make_kernels(backend)),
                self._params(weights),
                prompts,
                n_new,
                cfg,
                eos_ids,
                finished=finished,
            )
