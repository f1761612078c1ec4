"""Which files decide numbers that parity judges, and why the others are left out.

Every file of the four packages stands in one of the two tables; a test says so.
"""

# What is planted in, and the words of a row's place that name it. The function that holds the bug always counts.
IN: dict[str, tuple[str, ...]] = {
    # --- the lesson and what is chosen for speed, on each side
    **{
        f"{side}/{file}": places
        for side in ("jax_llm", "torch_llm")
        for file, places in {
            "attention.py": ("self_attn", "attention"),
            "documents.py": ("document", "mask", "self_attn"),
            "kernels.py": ("kernels",),
            "kv_cache.py": ("cache", "generate", "cached"),
            "layers.py": ("norm", "mlp", "embed", "proj", "lm_head", "swiglu", "linear"),
            "loss.py": ("loss", "cross_entropy"),
            "model.py": ("model", "lm_head", "init", "embed", "norm"),
            "optim.py": ("adamw", "clip", "optimizer", "decay", "weights", "update"),
            "random_bits.py": ("random", "init", "gumbel", "bits", "sample"),
            "rope.py": ("rope", "rotary", "self_attn"),
            "sampling.py": ("sampl", "filter", "gumbel", "generate"),
            "fast/attention.py": ("attention", "self_attn"),
            "fast/chunked_loss.py": ("chunk", "loss", "cross_entropy"),
            "fast/kernels.py": ("kernels",),
            "fast/layers.py": ("layers", "remat", "scan"),
            "fast/products.py": ("proj", "embed", "products", "fused", "lm_head"),
            "engine/decoding.py": ("generate", "decod", "cache"),
            "engine/evaluate.py": ("evaluat", "loss"),
            "engine/generate.py": ("generate", "sampl", "text"),
            "engine/gradients.py": ("grad", "loss", "micro"),
            "engine/run.py": ("run", "fit", "state", "resume", "log"),
            "engine/train.py": ("train", "step", "update", "run", "adamw", "state"),
            "engine/checkpoint.py": ("checkpoint", "state", "resume", "weights"),
        }.items()
    },
    "jax_llm/params.py": ("params", "weights", "tensor", "init"),
    "torch_llm/fast/optim.py": ("adamw", "clip", "optimizer", "update"),
    # --- what both share
    "llm_common/config.py": ("config", "preset"),
    "llm_common/hf_config.py": ("config", "from_hf", "to_hf"),
    "llm_common/random_bits.py": ("random", "init", "bits", "gumbel"),
    "llm_common/rope.py": ("rope", "frequenc", "rotary", "self_attn"),
    "llm_common/schedule.py": ("schedule", "step_scalars", "lr"),
    "llm_common/tensors.py": ("tensor", "weights", "init"),
    "llm_common/data/answers.py": ("answer", "example", "data", "prompt"),
    "llm_common/data/datasets.py": ("data", "batch", "order", "window"),
    "llm_common/data/evaluation.py": ("evaluat", "loss", "bytes", "window"),
    "llm_common/data/sequences.py": ("sequence", "data", "document", "text"),
    "llm_common/data/shards.py": ("shard", "data"),
    "llm_common/files/export.py": ("export", "file"),
    "llm_common/files/model_folder.py": ("folder", "file", "config"),
    "llm_common/files/tensor_files.py": ("file", "tensor", "weights"),
    "llm_common/run/estimates.py": ("estimate", "flops", "memory", "bytes"),
    "llm_common/run/metrics.py": ("metric", "log"),
    "llm_common/run/previous_step.py": ("step", "skip", "count"),
    "llm_common/run/settings.py": ("setting", "stop", "end"),
    "llm_common/text/bpe_reference.py": ("bpe", "merge", "tokenizer"),
    "llm_common/text/bpe_trainer.py": ("bpe", "merge", "tokenizer"),
    "llm_common/text/bpe_words.py": ("bpe", "merge", "tokenizer", "word"),
    "llm_common/text/corpus.py": ("corpus", "text", "document"),
    "llm_common/text/drawn_texts.py": ("text", "stop", "generate"),
    "llm_common/text/records.py": ("record", "text", "example"),
    "llm_common/text/text_stream.py": ("text", "stop", "stream"),
    "llm_common/text/tokenizer.py": ("tokenizer", "text", "ids"),
    "llm_common/text/words.py": ("word", "tokenizer", "pattern"),
}

MESHES = "what several devices do is judged by `parity sharded`, with bugs of its own"
PEOPLE = "for people: messages, progress, pages; decides no number of a model"
FILES = "refuses or repairs files and processes; its tests kill and damage them"
FAMILIES = "reads files of strangers; the tests compare it with the library that made them"
DEVICE = "asks for a device, or chooses a plan; every kernel a plan can name is judged in `kernels`"
BLOCKS = "for code of others: no model and no run calls it; its tests compare it with torch and optax"
PROGRAM = "reads flags and calls the engine; judged by the tests of the programs"

OUT: dict[str, str] = {
    **{
        f"{side}/{file}": reason
        for side in ("jax_llm", "torch_llm")
        for file, reason in {
            "__init__.py": PEOPLE,
            "blocks.py": BLOCKS,
            "engine/__init__.py": PEOPLE,
            "fast/__init__.py": PEOPLE,
            "engine/backend.py": DEVICE,
            "engine/device.py": DEVICE,
            "engine/plan.py": DEVICE,
            "engine/diagnose.py": PEOPLE,
            "engine/distributed.py": MESHES,
            "engine/hosts.py": MESHES,
            "engine/foreign_checkpoint.py": FAMILIES,
        }.items()
    },
    **{f"llm_common/{room}__init__.py": PEOPLE for room in ("", "data/", "files/", "run/", "text/")},
    "llm_common/checks.py": PEOPLE,
    "llm_common/command_line.py": PEOPLE,
    "llm_common/cudnn.py": DEVICE,
    "llm_common/errors.py": PEOPLE,
    "llm_common/processes.py": FILES,
    "llm_common/sharding.py": MESHES,
    "llm_common/files/dcp_metadata.py": FAMILIES,
    "llm_common/files/gguf_export.py": FAMILIES,
    "llm_common/files/tree_file.py": BLOCKS,
    "llm_common/run/backend.py": DEVICE,
    "llm_common/run/checkpoint.py": FILES,
    "llm_common/run/folder.py": FILES,
    "llm_common/run/host_memory.py": DEVICE,
    "llm_common/run/hosts.py": MESHES,
    "llm_common/run/launch.py": MESHES,
    "llm_common/run/log.py": FILES,
    "llm_common/run/plan.py": DEVICE,
    "llm_common/run/progress.py": PEOPLE,
    "llm_common/run/trackers.py": PEOPLE,
    "llm_common/text/chat_template.py": FAMILIES,
    "llm_common/text/chat_worker.py": FAMILIES,
    "llm_common/text/hf_tokenizer.py": FAMILIES,
    "llm_common/text/pattern_probe.py": FAMILIES,
    "llm_common/text/tokenizer_folder.py": FAMILIES,
    "llm_common/text/tokenizer_json.py": FAMILIES,
    "llm_common/text/tokenizers_library.py": FAMILIES,
    "llm_tools": PROGRAM,
}

# Functions of files in scope that are left out all the same.
ACCELERATOR = "runs on a GPU or TPU alone: judged by `make gpu` and `make tpu`"
OUT_FUNCTIONS: dict[tuple[str, str], str] = {
    ("jax_llm/fast/attention.py", "splash_attention"): ACCELERATOR,
    ("jax_llm/fast/attention.py", "SplashAttention"): ACCELERATOR,
    ("jax_llm/fast/attention.py", "resolve_backend"): DEVICE,
    ("torch_llm/fast/attention.py", "takes_blocks"): ACCELERATOR,
    ("torch_llm/fast/attention.py", "block_mask"): ACCELERATOR,
    ("torch_llm/fast/attention.py", "BlockPlaces"): ACCELERATOR,
    ("torch_llm/fast/attention.py", "_BlockPlaces"): ACCELERATOR,
    ("torch_llm/fast/attention.py", "with_blocks"): ACCELERATOR,
    ("torch_llm/fast/attention.py", "resolve_backend"): DEVICE,
    ("torch_llm/engine/decoding.py", "CapturedSteps"): ACCELERATOR,
    ("torch_llm/engine/decoding.py", "GraphCache"): ACCELERATOR,
    ("jax_llm/engine/run.py", "fit_and_save_on_mesh"): MESHES,
    ("torch_llm/engine/run.py", "fit_and_save_on_mesh"): MESHES,
    ("llm_common/text/corpus.py", "python_documentation"): "collects some text for a first try; any will do",
    ("llm_common/files/model_folder.py", "_what_it_is"): PEOPLE,
    ("llm_common/run/estimates.py", "memory_per_step"): PEOPLE,
    ("llm_common/run/estimates.py", "memory_advice"): PEOPLE,
    ("llm_common/text/corpus.py", "_docstrings"): "collects some text for a first try; any will do",
}
