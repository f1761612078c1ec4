"""Training on many devices, in PyTorch: one process for each device, and a model whose parameters are cut.

    here                                       jax_llm.engine.distributed
    parameters as DTensors                     arrays with a NamedSharding
    a Trainer whose model is cut by FSDP2      the same `train_step`, compiled for a
    and tensor-parallel hooks                  mesh: the compiler adds collectives
    one process for each device                one process for the devices of a host

FSDP2 runs over the axes data and fsdp: it gathers a layer's weights in the compute dtype before the layer and sums
gradients in float32. The axis tensor is hooks at the modules' borders: inside, activations are local tensors of this
device's heads and channels.

B batch, T positions, D hidden_size, V vocab_size.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

from llm_common.config import ModelConfig, Recipe
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import EvaluateLoss, Evaluation
from llm_common.run.checkpoint import TrainingState
from llm_common.sharding import AXES, MeshConfig, check_devices, check_mesh, check_sharded, shard_of, sharded_axis
from llm_common.tensors import (
    ReadOnDemand,
    Tensors,
    check_batch,
    check_tensors,
    init_constant,
    init_range,
    tensor_shapes,
)
from torch_llm import random_bits
from torch_llm.engine.checkpoint import copy
from torch_llm.engine.device import matmul_precision, to_device
from torch_llm.engine.generate import generate_stream
from torch_llm.engine.plan import decoding_kernels
from torch_llm.engine.train import Trainer
from torch_llm.fast.layers import Remat
from torch_llm.fast.optim import sums_of_squares
from torch_llm.kernels import Kernels
from torch_llm.loss import IGNORE_INDEX, cross_entropy, cross_entropy_sum
from torch_llm.model import CausalLM
from torch_llm.optim import make_optimizer


def make_mesh(config: MeshConfig, device_type: str) -> DeviceMesh:
    """The mesh of all processes. Raises UserError unless it takes exactly those."""
    check_devices(
        config, dist.get_world_size(), "device", f"start {config.size} processes, as one-model train does by itself"
    )
    return init_device_mesh(device_type, config.shape, mesh_dim_names=AXES)


# --- the axis tensor: what happens at the borders of which modules

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
HEADS_NORMS = ("q_norm", "k_norm")
REPLICATED_INPUT = ("self_attn", "mlp", "lm_head", "embed_tokens", *NORMS)
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


def whole(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """The same x on every device; in the backward pass their gradients, each of a part of the model, are added up."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def replicated_over_heads(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """x (B, T, heads, H), whose heads are divided among the devices."""
    return DTensor.from_local(x, mesh, [Shard(2)], run_check=False)


def sharded_channels(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """x (B, T, channels), whose channels are divided among the devices."""
    return DTensor.from_local(x, mesh, [Shard(-1)], run_check=False)


def local(x: Any) -> Any:
    """A device's own part of x."""
    return x.to_local() if isinstance(x, DTensor) else x


def all_reduce_sum(x: DTensor) -> Tensor:
    """The sum of the devices' partial results."""
    return x.redistribute(placements=[Replicate()]).to_local()


def full_vocabulary(logits: Any) -> Tensor:
    """Logits of all token ids on every device."""
    return all_reduce_sum(logits) if isinstance(logits, DTensor) else logits


def parallelize(model: CausalLM, mesh: DeviceMesh) -> None:
    """Cut a model over the axis tensor: its parameters become DTensors, and hooks at its modules' borders talk.

    The logits come out cut over the vocabulary, as `loss_parallel` takes them. `model.cfg` is then that of a device's
    own heads.
    """
    for name, p in list(model.named_parameters()):
        axis = sharded_axis("tensor", name)
        placement: Placement = Replicate() if axis is None else Shard(axis)
        *path, last = name.split(".")
        module = model.get_submodule(".".join(path))
        size = [n // mesh.size() if placement == Shard(i) else n for i, n in enumerate(p.shape)]
        cut = DTensor.from_local(p.new_empty(size), mesh, [placement], run_check=False)
        module.register_parameter(last, nn.Parameter(cut))

    def before(change: Callable[[Any, DeviceMesh], DTensor]) -> Callable:
        return lambda module, args: (change(args[0], mesh), *args[1:])

    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in REPLICATED_INPUT:
            module.register_forward_pre_hook(before(whole))
        if kind in HEADS_NORMS:
            module.register_forward_pre_hook(before(replicated_over_heads))
        if kind in ROW_PARALLEL:
            module.register_forward_pre_hook(before(sharded_channels))
        if kind in COLUMN_PARALLEL + NORMS + HEADS_NORMS:
            module.register_forward_hook(lambda module, args, out: local(out))
        if kind in (*ROW_PARALLEL, "embed_tokens"):
            module.register_forward_hook(lambda module, args, out: all_reduce_sum(out))
    heads, kv_heads = model.cfg.num_attention_heads // mesh.size(), model.cfg.num_key_value_heads // mesh.size()
    model.cfg = replace(model.cfg, num_attention_heads=heads, num_key_value_heads=kv_heads)
    if model.lm_head is None:
        embed_tokens, attend = model.model.embed_tokens, model.model.embed_tokens.attend
        embed_tokens.attend = lambda x: attend(whole(x, mesh))


# --- the axes data and fsdp


def shard(model: CausalLM, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Cut a model over the axes data and fsdp: each layer is a group of weights that is gathered together.

    A layer's whole weights are kept until its backward pass, or gathered once more there if remat spares memory.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        cast_forward_inputs=False,
    )

    def placement(p: nn.Parameter) -> Shard:
        axis = sharded_axis("fsdp", names[id(p)])
        assert axis is not None, "every weight is cut by fsdp"
        return Shard(axis)

    again = mesh["fsdp"].size() > 1 and isinstance(model.kernels.layer, Remat)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=False)


def shard_model(
    cfg: ModelConfig,
    mesh: DeviceMesh,
    kernels: Kernels,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[CausalLM, dict[str, nn.Parameter]]:
    """A model cut over a mesh, its weights in `dtype` still to be filled in, and this device's parts of them by
    canonical name.
    """
    with torch.device("meta"):
        model = CausalLM(cfg, kernels).to(dtype)
    if mesh["tensor"].size() > 1:
        parallelize(model, mesh["tensor"])
    shard(model, mesh["data", "fsdp"], compute_dtype)
    model.to_empty(device=device)
    named = dict(model.named_parameters())
    return model, {name: nn.Parameter(local(named[name].detach())) for name in tensor_shapes(cfg)}


def copy_shards(
    cfg: ModelConfig, config: MeshConfig, parts: Mapping[str, Tensor], tensors: Tensors, what: str = "weights"
) -> None:
    """Copy a process's part of canonical tensors into its local ones; nothing else of a file is read."""
    check_tensors(cfg, tensors, what)
    at = config.coordinates(dist.get_rank())
    for name, part in parts.items():
        copy(part, tensors[name][shard_of(name, tensor_shapes(cfg)[name], config, at)])


class ShardedTrainer(Trainer):
    """A training run on the devices of a mesh. Every process has one of these and calls the same methods in the same
    order.

    The optimizer works on the local parts, `parameters` by canonical name: an update needs nothing of other devices.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: MeshConfig,
        device: torch.device | str = "cpu",
        init_weights: bool = True,
    ) -> None:
        check_sharded(config, recipe)
        self.config, self.mesh = config, make_mesh(config, torch.device(device).type)
        self.at = config.coordinates(dist.get_rank())
        self._cross_entropy = cross_entropy
        super().__init__(recipe, device, init_weights)

    def _make_model(self, kernels: Kernels) -> None:
        dtype = getattr(torch, self.recipe.train.master_dtype)
        self.model, self.parameters = shard_model(self.cfg, self.mesh, kernels, dtype, self.compute_dtype, self.device)
        parameters = nn.ParameterList(self.parameters.values())
        self.optimizer = make_optimizer(self.recipe.optimizer, parameters, self.optimizer_class)

    def shard_of(self, name: str) -> tuple[slice, ...]:
        """The part of a canonical tensor that this process keeps."""
        return shard_of(name, tensor_shapes(self.cfg)[name], self.config, self.at)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill in this process's part of the initial weights of `train.seed`, the same bits as on one device."""
        for i, (name, p) in enumerate(self.parameters.items()):
            width = init_range(self.cfg, name)
            if width is None:
                p.fill_(init_constant(name))
                continue
            rows, columns = (torch.arange(cut.start, cut.stop, device=p.device) for cut in self.shard_of(name))
            key = random_bits.fold_in(random_bits.key(self.recipe.train.seed, p.device), i)
            bits = random_bits.random_bits_at(key, rows[:, None] * tensor_shapes(self.cfg)[name][1] + columns)
            p.copy_((random_bits.uniform(bits, p.dtype) - 0.5) * torch.tensor(width, dtype=p.dtype))

    def from_canonical(self, weights: Tensors) -> None:
        """Copy this process's part of canonical weights into the model; nothing else of a file is read."""
        copy_shards(self.cfg, self.config, self.parameters, weights)

    def _compile(self) -> None:
        for module in (*self.model.model.layers, self.model.model.norm):
            module.forward = torch.compile(module.forward)  # within FSDP's hooks, which are not for a compiler
        if self.config.tensor == 1:
            self._cross_entropy = torch.compile(cross_entropy)

    def loss_and_grads(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the global batch; inputs and targets (B / shards, T) are this process's rows of it."""
        assert isinstance(self.model, FSDPModule)
        steps, batch_shards = self.recipe.execution.gradient_accumulation_steps, self.config.batch_shards
        count = self.sum_over_batch((targets != IGNORE_INDEX).sum())
        self.model.zero_grad()
        losses = []
        for i, micro_batch in enumerate(zip(inputs.chunk(steps), targets.chunk(steps), strict=True)):
            self.model.set_requires_gradient_sync(i == steps - 1)
            with self._loss_parallel():
                logits = self.model(micro_batch[0])
                loss = local(self._cross_entropy(logits, micro_batch[1], count))
                (loss * batch_shards).backward()  # FSDP takes the mean over processes, the loss is a sum of their parts
            losses.append(loss.detach())
        named = dict(self.model.named_parameters())
        for name, p in self.parameters.items():
            grad = named[name].grad
            p.grad = None if grad is None else local(grad)
        return self.sum_over_batch(torch.stack(losses).sum())

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of the gradients, that of all parts."""
        squares = torch.zeros(2, dtype=torch.promote_types(self.compute_dtype, torch.float32), device=self.device)
        for cut in (False, True):  # what the axis tensor does not cut is whole on each of its devices, and counts once
            parts = [p for name, p in self.parameters.items() if (sharded_axis("tensor", name) is not None) == cut]
            grads = [p.grad for p in parts if p.grad is not None]
            if grads:
                squares[int(cut)] = sums_of_squares(grads).sum()
        self._sum_over("fsdp", squares)
        self._sum_over("tensor", squares[1:])
        return torch.sqrt(squares.sum())

    def _sum_over(self, axis: str, x: Tensor) -> None:
        if self.mesh[axis].size() > 1:
            dist.all_reduce(x, group=self.mesh.get_group(axis))

    def sum_over_batch(self, x: Tensor) -> Tensor:
        """The sum of x over the processes that have rows of the batch of their own; x is changed."""
        self._sum_over("data", x)
        self._sum_over("fsdp", x)
        return x

    def read_batch(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """This process's rows of this step's inputs and targets, each (B / shards, T)."""
        batch = dataset.batch(self.step, self.config.batch_shard(dist.get_rank()), self.config.batch_shards)
        check_batch(*batch, self.cfg.vocab_size, f"step {self.step}")
        inputs, targets = (to_device(x, self.device) for x in batch)
        return inputs, targets

    @torch.no_grad()
    def evaluate(self, evaluation: Evaluation) -> tuple[float, int]:
        """Sum of the losses in nats over all held-out tokens, added up in float64, and how many tokens those are."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        rows = evaluation.batch_size // self.config.batch_shards
        first = rows * self.config.batch_shard(dist.get_rank())
        with matmul_precision(self.recipe.train.compute_dtype):
            for batch in evaluation.batches():
                inputs, targets = (torch.tensor(x[first : first + rows], device=self.device).long() for x in batch)
                with self._loss_parallel():
                    loss, count = cross_entropy_sum(self.model(inputs), targets)
                totals += torch.stack([local(loss).double(), count.double()])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # as a backward pass does: gathered weights must not outlive the next update
        total, count = self.sum_over_batch(totals).tolist()
        return total, int(count)

    @torch.no_grad()
    def first_not_finite(self, inputs: Tensor, targets: Tensor) -> str:
        """Which weight, or else which gradient, is the first that is not finite on any device; for people."""
        n = len(self.parameters)
        for what in ("weight", "gradient"):
            for i, (name, p) in enumerate(self.parameters.items()):
                tensor = p if what == "weight" else p.grad
                bad = torch.tensor(
                    tensor is not None and not bool(torch.isfinite(tensor).all()), device=self.device
                ).int()
                dist.all_reduce(bad)
                if bad:
                    return f"the {what} of {name}, tensor {i + 1} of {n}, is the first that is not finite"
        return "weights and gradients are finite now: the norm overflowed"

    def read(self, part: Callable[[nn.Parameter], Tensor]) -> ReadOnDemand:
        """Canonical tensors, each put together when it is asked for, from a process's part of every one of them."""
        named = dict(self.model.named_parameters())

        def whole_tensor(name: str) -> np.ndarray:
            like = named[name]
            assert isinstance(like, DTensor)
            shape, stride = like.shape, like.stride()
            cut = DTensor.from_local(
                part(self.parameters[name]),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=shape,
                stride=stride,
            )
            return cut.full_tensor().cpu().numpy()

        return ReadOnDemand(self.parameters, whole_tensor)

    def to_training_state(self) -> TrainingState:
        """The framework-free form of this state, whose tensors are put together one by one."""
        self.resolve_last_step()
        weights = self.read(lambda p: p.detach())
        mu, nu = (self.read(lambda p, i=i: self.optimizer.moments(p)[i]) for i in (0, 1))
        return TrainingState(weights, mu, nu, self.step, self.optimizer.count)

    def from_training_state(self, saved: TrainingState) -> None:
        """Put a saved state into this trainer; of a tensor in a file every process reads its own part."""
        self.from_canonical(saved.weights)
        for i, (label, tensors) in enumerate((("mu", saved.mu), ("nu", saved.nu))):
            moments = {name: self.optimizer.moments(p)[i] for name, p in self.parameters.items()}
            copy_shards(self.cfg, self.config, moments, tensors, label)
        self.step, self.optimizer.count = saved.step, saved.adam_count

    def _loss_parallel(self) -> contextlib.AbstractContextManager[None]:
        return loss_parallel() if self.config.tensor > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def evaluator(
    recipe: Recipe, weights: Tensors, config: MeshConfig, device: torch.device | str = "cpu"
) -> Iterator[EvaluateLoss]:
    """`torch_llm.engine.evaluate.evaluator` on a mesh: every process is given the loss over all rows."""
    trainer = ShardedTrainer(recipe, config, device, init_weights=False)
    trainer.from_canonical(weights)
    yield trainer.evaluate


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, config: MeshConfig, device: torch.device | str, compute_dtype: str = "float32"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """`torch_llm.engine.generate.generator` on a mesh: weights, cache and logits are cut, and every process is given
    all texts.
    """
    check_mesh(config, cfg)
    target, dtype = torch.device(device), getattr(torch, compute_dtype)
    model, parts = shard_model(
        cfg, make_mesh(config, target.type), decoding_kernels(compute_dtype), dtype, dtype, target
    )
    copy_shards(cfg, config, parts, weights)
    model.register_forward_hook(lambda module, args, logits: full_vocabulary(logits))
    with matmul_precision(compute_dtype):
        yield partial(generate_stream, model)
