"""What a training step costs, from the shapes alone: floating-point operations and memory."""

from llm_common.config import ModelConfig, Recipe, TrainConfig
from llm_common.sharding import ONE_DEVICE, MeshConfig

# Peak of dense bfloat16 matrix products, FLOP/s, by a part of the device's name. Source: the makers' data sheets.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
GIB = 2**30


def peak_flops(device_name: str, compute_dtype: str) -> float | None:
    """The device's peak in FLOP/s, or None if it, or the peak for this dtype, is not known."""
    if compute_dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name.lower() in device_name.lower()), None)


def flops_per_step(cfg: ModelConfig, train: TrainConfig) -> float:
    """Model FLOPs of a training step: 6 for each weight of a matrix product and token, and causal attention.

    The head counts and the look-up of embeddings does not; what rematerialisation computes again is not counted.
    """
    d, h = cfg.hidden_size, cfg.head_dim
    layer = 2 * d * h * (cfg.num_attention_heads + cfg.num_key_value_heads) + 3 * d * cfg.intermediate_size
    products = cfg.num_hidden_layers * layer + cfg.vocab_size * d
    return 6.0 * products * train.batch_size * train.seq_len + attention_flops(cfg, train)


def attention_flops(cfg: ModelConfig, train: TrainConfig) -> float:
    """Those of them that are q k^T and its product with v: a query looks at (T + 1) / 2 keys on average, or at its
    window.
    """
    window = min(cfg.sliding_window or train.seq_len, train.seq_len)
    keys = window - window * (window - 1) / (2 * train.seq_len)
    per_token = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * keys
    return 6.0 * per_token * train.batch_size * train.seq_len


def decode_bytes(cfg: ModelConfig, batch_size: int, context: float, compute_dtype: str) -> float:
    """The bytes that one decoded token of each text must read: the weights but for the look-up table, and the cache.

    context: the positions in the cache, on average.
    """
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[compute_dtype]
    table = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    cache = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * context * batch_size
    return size * (cfg.num_parameters() - table + cache)


def memory_per_step(
    recipe: Recipe, fused_attention: bool, compiled: bool, mesh: MeshConfig = ONE_DEVICE
) -> dict[str, int]:
    """About how many bytes a step needs on each device: exact for what is kept, an estimate for activations.

    Keys: weights, moments, gradients (master dtype, and the cast copies of both), activations (of one micro-batch). The
    backward pass frees activations while it allocates gradients, so without rematerialisation only the larger of the
    two adds to the peak. Measured on an H100 at 124m, bfloat16, 32,768 tokens: the sum is 1.0 to 1.25 times the peak of
    both frameworks; at 1b and 8b, by the TPU's compiler and on one or two H100s and H200s: within 10 %
    (docs/tpu_compiled.md, docs/scaling.md).
    """
    cfg, train, execution = recipe.model, recipe.train, recipe.execution
    parts, tensor = mesh.fsdp * mesh.tensor, mesh.tensor
    p, master = cfg.num_parameters(), 8 if train.compute_dtype == "float64" else 4
    c = {"float64": 8, "float32": 4, "bfloat16": 2}[train.compute_dtype]
    wide = max(c, 4)
    cast = 2 * p * c // tensor if c != master and mesh.fsdp == 1 else 0
    if mesh.fsdp > 1 and execution.remat == "none":
        cast = 2 * p * c // tensor  # gathered weights stay for the backward pass, as activations do
    elif mesh.fsdp > 1:  # one layer at a time, and the embedding or the head
        embeddings = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_word_embeddings else 2)
        cast = c * (embeddings + (p - embeddings) // cfg.num_hidden_layers) // tensor
    tokens = train.batch_size // execution.gradient_accumulation_steps * train.seq_len // mesh.batch_shards
    d, f, t = cfg.hidden_size, cfg.intermediate_size // tensor, train.seq_len
    heads = (cfg.num_attention_heads + 2 * cfg.num_key_value_heads) * cfg.head_dim // tensor
    # Scores and their softmax, where attention keeps them (the reference and XLA). A compiler fuses the float32 middle
    # of norms and SwiGLU away.
    scores = 0 if fused_attention else cfg.num_attention_heads // tensor * t * (wide + c)
    layer = c * (5 * d + heads + 2 * f) if compiled else c * (5 * d + 2 * heads + 3 * f) + wide * (4 * d + 2 * f)
    product = c * f if compiled else 0  # SwiGLU's, which the backward pass reads beside its two factors
    kept = {"none": layer + product + scores, "dots": c * (3 * d + heads + 2 * f), "full": c * d}[execution.remat]
    working = layer + scores if execution.remat != "none" else 0
    logits = cfg.vocab_size // tensor * (c + wide * (1 if compiled else 2)) // execution.loss_chunks
    gradients, activations = p * master // parts + cast, tokens * (cfg.num_hidden_layers * kept + working + logits)
    if compiled and execution.remat == "none" and execution.gradient_accumulation_steps == 1:
        gradients = cast // 2 + max(0, gradients - cast // 2 - activations)  # the cast weights stay
    return {
        "weights": p * master // parts,
        "moments": 2 * p * master // parts,
        "gradients": gradients,
        "activations": activations,
    }


def memory_advice(recipe: Recipe, need: dict[str, int]) -> str:
    """What a step needs (of `memory_per_step`) and which flags lower it, in a line for an error."""
    execution = recipe.execution
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in need.items())
    flags = [f"`gradient_accumulation_steps` {2 * execution.gradient_accumulation_steps} (the same result)"]
    if execution.loss_chunks == 1 and recipe.train.seq_len % 8 == 0:
        flags.append("`loss_chunks` 8")
    if execution.remat != "full":
        flags.append("`remat` full")
    flags += ["a smaller `seq_len`", "a smaller model", "`mesh` fsdp=N on N devices"]
    return f"a step needs about {sum(need.values()) / GIB:.2f} GiB ({parts}); lower it with {', '.join(flags)}"
