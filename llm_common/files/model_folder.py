"""Folders with a model in them, as Hugging Face's: config and weights, or a word on what stands there instead."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import UserError, read_json
from llm_common.files.tensor_files import MODEL_FILE, TensorFiles, open_model_files
from llm_common.tensors import check_tensors

CONFIG_FILE = "config.json"


def load_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint or of a Hugging Face folder."""
    return ModelConfig.from_file(folder / CONFIG_FILE)


def open_weights(folder: Path, listed: Collection[str] | None = None) -> tuple[ModelConfig, TensorFiles]:
    """Config and weights of a folder. listed: the files of a checkpoint, beside which nothing else counts."""
    cfg = load_config(folder)
    weights = open_model_files(folder, listed=listed)
    for name in [name for name in weights if name.endswith("rotary_emb.inv_freq")]:
        weights.without(name)  # old files hold this table, which follows from the config
    if cfg.tie_word_embeddings and "lm_head.weight" in weights and "model.embed_tokens.weight" in weights:
        head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        if not np.array_equal(head, embedding):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, but the config ties the two")
        weights.without("lm_head.weight")
    check_tensors(cfg, weights, str(folder))
    return cfg, weights


def check_model_folder(path: Path) -> None:
    """Raise UserError for what is no folder with a config and safetensors, saying what it is and how to go on."""
    what = _what_it_is(path)
    if what is not None:
        raise UserError(f"{path}: {what}")


def _what_it_is(path: Path) -> str | None:
    wanted = "a folder with config.json and model.safetensors is needed"
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            return (
                "no such folder. If it is the name of a model on the Hugging Face hub, fetch it first: "
                f"hf download {path} --local-dir {path.name}, and give that folder"
            )
        return f"no such folder; {wanted}"
    if path.is_file():
        known = {
            ".safetensors": "one file of weights; give the folder that it lies in, with its config.json",
            ".gguf": "a GGUF file, of llama.cpp; transformers reads it (from_pretrained(folder, gguf_file=...)), "
            "then save_pretrained",
            ".json": "a file; give the folder that it lies in",
            ".npz": "an archive of arrays; save the weights as safetensors, under Hugging Face's names",
        }
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            return "a pickle, which can run code and is not read; save the model with transformers as safetensors"
        return known.get(path.suffix, f"a file; {wanted}")
    names = {entry.name for entry in path.iterdir()}
    weights = MODEL_FILE in names or f"{MODEL_FILE}.index.json" in names
    if "adapter_config.json" in names:  # beside weights, too: transformers would change them by it
        content = read_json(path / "adapter_config.json")
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        of = f" of {base}" if base else ""
        return (
            f"a PEFT adapter (LoRA){of}, which changes that model's weights; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)"
        )
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return "a checkpoint of torch's DCP; one-model convert-checkpoint --from-dcp makes one of this program of it"
    if "_CHECKPOINT_METADATA" in names or "manifest.ocdbt" in names:
        return "an Orbax checkpoint; one-model convert-checkpoint --from-orbax makes one of this program of it"
    if any(name.endswith(".gguf") for name in names) and not any(name.endswith(".safetensors") for name in names):
        return "holds a GGUF file, of llama.cpp; transformers reads it (gguf_file=...), then save_pretrained"
    runs = sorted(entry.name for entry in path.iterdir() if (entry / "log.jsonl").is_file())
    if runs and not weights:
        return f"holds runs; give one of them: {', '.join(str(path / name) for name in runs[:5])}"
    if CONFIG_FILE not in names:
        if "refs" in names and "snapshots" in names:
            return f"a folder of the hub's cache; give the one inside it: {next((path / 'snapshots').glob('*'), path)}"
        return f"has no {CONFIG_FILE}; {wanted}"
    if not weights:
        others = sorted(
            name for name in names if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".safetensors"))
        )
        if others and others[0].endswith(".safetensors"):
            return f"has {others[0]}, but neither {MODEL_FILE} nor its index; name the file of all weights {MODEL_FILE}"
        if others:
            return (
                f"has {others[0]}, which can run code and is not read; save the model with transformers as safetensors"
            )
        return f"has a {CONFIG_FILE} but no weights; {wanted}"
    return None
