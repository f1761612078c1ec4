"""Planted bugs of training on many devices: for each the processes and the mesh that show it, and the row that must go
red.
"""

from dataclasses import dataclass

from parity.core.planting import Edit


@dataclass(frozen=True)
class ShardingBug:
    name: str
    edit: Edit
    framework: str
    processes: int
    devices: int  # of each process
    shape: str
    mesh: str
    item: str  # what the first red row is about, or the words with which a process refuses to go on


def torch(name, function, old, new, mesh, item, shape="llama", processes=4) -> ShardingBug:
    edit = Edit(f"torch_llm.engine.distributed:{function}", old, new)
    return ShardingBug(name, edit, "torch", processes, 1, shape, mesh, item)


def jax(name, function, old, new, mesh, item, shape="llama", processes=1, devices=4) -> ShardingBug:
    edit = Edit(f"jax_llm.engine.distributed:{function}", old, new)
    return ShardingBug(name, edit, "jax", processes, devices, shape, mesh, item)


SHARDING_BUGS = (
    torch(
        "documents together on a mesh",
        "shard_model",
        "CausalLM(cfg, kernels)",
        "CausalLM(cfg, replace(kernels, places=make_kernels().places))",
        "data=2",
        "logits",
        shape="documents",
        processes=2,
    ),
    jax(
        "documents together in a run on a mesh",
        "mesh_model",
        "make_model(recipe, mesh.devices.flat[0].platform)",
        "make_model(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, document_separator=None)), "
        "mesh.devices.flat[0].platform)",
        "fsdp=2,tensor=2",
        "losses",
        shape="documents",
    ),
    torch(
        "gradient averaged, not summed",
        "ShardedTrainer.loss_and_grads",
        "(loss * batch_shards).backward()",
        "loss.backward()",
        "data=2",
        "gradients",
        processes=2,
    ),
    torch(
        "mean of every process's own mean",
        "ShardedTrainer.loss_and_grads",
        "self.sum_over_batch((targets != IGNORE_INDEX).sum())",
        "(targets != IGNORE_INDEX).sum() * batch_shards",
        "data=2",
        "loss",
        processes=2,
    ),
    torch(
        "loss of one process's rows",
        "ShardedTrainer.loss_and_grads",
        "self.sum_over_batch(torch.stack(losses).sum())",
        "torch.stack(losses).sum() * batch_shards",
        "fsdp=2",
        "loss",
        processes=2,
    ),
    torch(
        "only the first micro-batch's gradient is summed over devices",
        "ShardedTrainer.loss_and_grads",
        "i == steps - 1",
        "i == 0",
        "fsdp=2",
        "gradients",
        processes=2,
    ),
    torch(
        "norm of a process's own gradients",
        "ShardedTrainer.grad_norm",
        "self._sum_over('fsdp', squares)",
        "pass",
        "fsdp=2",
        "losses",
        processes=2,
    ),
    torch(
        "weights that are not cut count twice in the norm",
        "ShardedTrainer.grad_norm",
        "self._sum_over('tensor', squares[1:])",
        "self._sum_over('tensor', squares)",
        "tensor=2",
        "losses",
        processes=2,
    ),
    torch(
        "targets counted on every device of the axis tensor",
        "ShardedTrainer.sum_over_batch",
        "self._sum_over('data', x)",
        "self._sum_over('data', x)\nself._sum_over('tensor', x)",
        "tensor=2",
        "gradients",
        processes=2,
    ),
    torch(
        "the same data on two processes",
        "ShardedTrainer.read_batch",
        "self.config.batch_shard(dist.get_rank())",
        "0",
        "data=2",
        "logits",
        processes=2,
    ),
    torch(
        "a device of the axis tensor has other data",
        "ShardedTrainer.read_batch",
        "self.config.batch_shard(dist.get_rank())",
        "dist.get_rank() % self.config.batch_shards",
        "data=2,tensor=2",
        "logits",
    ),
    torch(
        "replicas are not brought together",
        "shard_model",
        "mesh['data', 'fsdp']",
        "mesh['fsdp']",
        "data=2,fsdp=2",
        "replicas differ",
    ),
    torch(
        "initial weights numbered within the part",
        "ShardedTrainer.init_weights",
        "rows[:, None] * tensor_shapes(self.cfg)[name][1] + columns",
        "(rows - rows[0])[:, None] * len(columns) + columns - columns[0]",
        "fsdp=2",
        "initial weights",
        processes=2,
    ),
    torch(
        "a replica starts from weights of its own",
        "ShardedTrainer.init_weights",
        "random_bits.key(self.recipe.train.seed, p.device)",
        "random_bits.key(self.recipe.train.seed + self.at['data'], p.device)",
        "data=2",
        "replicas differ",
        processes=2,
    ),
    torch(
        "gradients summed in bfloat16",
        "shard",
        "torch.promote_types(compute_dtype, torch.float32)",
        "compute_dtype",
        "data=2",
        "of 8 bits",
        processes=2,
    ),
    torch(
        "devices' partial sums averaged",
        "all_reduce_sum",
        "x.redistribute(placements=[Replicate()]).to_local()",
        "x.redistribute(placements=[Replicate()]).to_local() / x.device_mesh.size()",
        "tensor=2",
        "logits",
        processes=2,
    ),
    torch(
        "gradient of the heads' norm of own heads only",
        "replicated_over_heads",
        "[Shard(2)]",
        "[Replicate()]",
        "tensor=2",
        "replicas differ",
        shape="qwen3",
        processes=2,
    ),
    torch(
        "held-out loss of one process's rows",
        "ShardedTrainer.evaluate",
        "self.sum_over_batch(totals).tolist()",
        "totals.tolist()",
        "data=2",
        "held-out",
        processes=2,
    ),
    torch(
        "every process restores the first one's part",
        "copy_shards",
        "config.coordinates(dist.get_rank())",
        "config.coordinates(0)",
        "fsdp=2",
        "weights of",
        processes=2,
    ),
    ShardingBug(
        "biases cut in another order than FSDP does",
        Edit(
            "llm_common.sharding:shard_of",
            "for axis in axes:\n    size //= sizes[axis]\n    start += at[axis] * size",
            "for axis in reversed(axes):\n    size //= sizes[axis]\n    start += at[axis] * size",
        ),
        "torch",
        4,
        1,
        "qwen2",
        "fsdp=2,tensor=2",
        "logits",
    ),
    ShardingBug(
        "the last row of every process is dropped",
        Edit(
            "llm_common.data.datasets:host_rows",
            "step * batch_size + host * rows",
            "step * batch_size + host * (rows - 1)",
        ),
        "jax",
        1,
        4,
        "llama",
        "data=4",
        "logits",
    ),
    jax(
        "the same data on all devices",
        "read_batch",
        "dataset.batch(step, i, shards)",
        "dataset.batch(step, 0, shards)",
        "data=4",
        "logits",
    ),
    jax(
        "rows of another device",
        "read_batch",
        "dataset.batch(step, i, shards)",
        "dataset.batch(step, shards - 1 - i, shards)",
        "data=2,fsdp=2",
        "logits",
    ),
    jax(
        "one host's rows for all of its devices",
        "read_batch",
        "(index[0].start or 0) * shards // train.batch_size",
        "jax.process_index() * 2",
        "data=4",
        "logits",
        processes=2,
        devices=2,
    ),
    jax(
        "layers restored in reverse order",
        "from_canonical",
        "leaf.names[index[0]]",
        "leaf.names[::-1][index[0]]",
        "fsdp=4",
        "weights of",
    ),
    jax(
        "moments restored the wrong way round",
        "from_training_state",
        "optax.tree_utils.tree_set(shapes, mu=mu, nu=nu)",
        "optax.tree_utils.tree_set(shapes, mu=nu, nu=mu)",
        "fsdp=4",
        "mu of",
    ),
)
