"""Hugging Face's tokenizer files, read through the `tokenizers` library.

`HfTokenizer` has the methods that training and generation use of `Tokenizer`, so either can stand for the other.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError, read_json, require_package
from llm_common.hf_files import read_hf_folder, to_hf_files
from llm_common.tokenizer import FILE_NAME, Tokenizer

# What belongs to a model beside its weights and goes with it into checkpoints and exports.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
LARGEST_FILE = 256 << 20  # bytes


class HfTokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, and what the files beside it say of special tokens."""

    def __init__(self, folder: Path) -> None:
        require_package("tokenizers", "hf")
        import tokenizers

        self.files = {}
        for name in FILES:
            path = folder / name
            if path.is_file():
                if path.stat().st_size > LARGEST_FILE:
                    raise UserError(f"{path}: {path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read")
                self.files[name] = path.read_bytes()
        if "tokenizer.json" not in self.files:
            raise UserError(
                f"{folder}: has no tokenizer.json; save the tokenizer with transformers as a fast tokenizer"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = self._json(folder, "tokenizer_config.json")
        self.token_ids = {}  # the keys of config.json that name special tokens
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        generation = self._json(folder, "generation_config.json")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = generation.get(key, config.get(key))
            if value is None and isinstance(text := self._special(key.removesuffix("_id")), str):
                value = self._tokenizer.token_to_id(text)
            if value is not None:
                self.token_ids[key] = value

    def _json(self, folder: Path, name: str) -> dict[str, Any]:
        content = read_json(folder / name) if name in self.files else {}
        if not isinstance(content, dict):
            raise UserError(f"{folder / name}: expected an object with keys")
        return content

    def _special(self, name: str) -> str | None:
        """The text of "bos_token", "eos_token" or "pad_token"."""
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text; chat models have several."""
        value = self.token_ids.get("eos_token_id")
        return () if value is None else tuple(value) if isinstance(value, list) else (value,)

    @property
    def end_of_text(self) -> int | None:
        """The id that separates documents, or None: the tokenizer's own end of text, else the first of `eos_ids`."""
        text = self._special("eos_token")
        own = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return own if own is not None else next(iter(self.eos_ids), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that a model expects around it; special tokens written out become their ids."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate
            return self._tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text with the tokens that the model expects around it (a beginning of text), as transformers gives them."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are written out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 (vocab_size,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        metaspace = "\u2581" in json.dumps(json.loads(self.files["tokenizer.json"]).get("decoder"), ensure_ascii=False)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if not metaspace:  # byte-level: one character for each byte
                lengths[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode("utf-8"))
        return lengths

    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Messages of {"role", "content"} in the model's chat template. Raises UserError if it has none or it fails."""
        require_package("jinja2", "hf")
        import jinja2
        import jinja2.sandbox

        template = self._config.get("chat_template")
        if isinstance(template, list):
            template = next((x.get("template") for x in template if x.get("name") == "default"), None)
        if "chat_template.jinja" in self.files:
            template = self.files["chat_template.jinja"].decode("utf-8")
        if not isinstance(template, str):
            raise UserError("the tokenizer has no chat template: leave out --chat")

        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        # a template is somebody's program: it runs in jinja's sandbox, as in transformers
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = fail
        special = {name: self._special(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **special
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template failed: {error}") from None


AnyTokenizer = Tokenizer | HfTokenizer


def open_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer of a `bpe.json`, of a `tokenizer.json` or of a folder with one of them, or with GPT-2's vocab.json and merges.txt."""
    if path.is_dir():
        tokenizer = load_tokenizer(path)
        if tokenizer is None:
            raise UserError(
                f"{path}: has neither {FILE_NAME} nor tokenizer.json nor vocab.json and merges.txt; "
                "give a tokenizer with --tokenizer"
            )
        return tokenizer
    return _open_hf(path.parent) if path.name == "tokenizer.json" else Tokenizer.load(path)


def load_tokenizer(folder: Path) -> AnyTokenizer | None:
    """The tokenizer in a folder, ours if it has one, else Hugging Face's; None if there is neither."""
    if (folder / FILE_NAME).is_file():
        return Tokenizer.load(folder / FILE_NAME)
    if (folder / "tokenizer.json").is_file():
        return _open_hf(folder)
    return read_hf_folder(folder) if (folder / "merges.txt").is_file() else None


def _open_hf(folder: Path) -> AnyTokenizer:
    """Through the `tokenizers` library, or in Python if it is not installed."""
    return HfTokenizer(folder) if importlib.util.find_spec("tokenizers") else read_hf_folder(folder)


def companions(tokenizer: AnyTokenizer) -> dict[str, bytes]:
    """The files that let this program and transformers load the tokenizer from a checkpoint: name -> contents."""
    if isinstance(tokenizer, HfTokenizer):
        return tokenizer.files
    return {FILE_NAME: tokenizer.to_json().encode("utf-8"), **to_hf_files(tokenizer)}


def token_ids(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """The keys of config.json that name special tokens. Left out, transformers would assume Llama 2's."""
    if isinstance(tokenizer, HfTokenizer):
        return {"bos_token_id": None, "eos_token_id": None, **tokenizer.token_ids}
    first = [tokenizer.special_tokens[token] for token in tokenizer.prompt_prefix]
    return {"bos_token_id": first[0] if first else tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
