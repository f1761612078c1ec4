"""What the files of a Hugging Face folder say of its tokenizer, beside the vocabulary: special tokens, their roles, the
chat template.

Three things end at a token, and each has its own: a document (`document_end`), a turn of a conversation (`turn_end`)
and the text that is being generated (`stop_ids`, of which there may be several). Chat models name the end of a turn as
their `eos_token`, so that one name is no answer to all three questions.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, json_bytes, notice, parse_json, read_small
from llm_common.text.chat_template import render_chat

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
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers' classes assume of a special token that no file names.
_CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
# Tokens that end a document in the families that have another one for a turn.
DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "</s>",
    "<EOS_TOKEN>",
    "<|END_OF_TEXT|>",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
)
# Tokens that end a turn, for tokenizers without a template, or where none can be rendered.
TURN_ENDS = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|return|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|end_of_role|>",
        "<|user_end|>",
        "<|assistant_end|>",
        "<|eoa|>",
    ]
)
_PROBE = "\u2058\u205c\u2058"  # an answer that no template has in its text


class TokenizerFolder:
    """The files of a folder, and what they say.

    files: name -> contents, of those that go with a model. Raises UserError, naming the file, for one that is huge or
    not what its name says.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.files = {name: read_small(folder / name) for name in FILES if (folder / name).is_file()}
        self.config = self._object("tokenizer_config.json")
        # transformers reads special_tokens_map.json and added_tokens.json only where tokenizer_config.json lists no
        # added tokens, and then they say more than it does
        self._listed = isinstance(self.config.get("added_tokens_decoder"), dict)
        self._map = {} if self._listed else self._object("special_tokens_map.json")
        self._generation = self._object("generation_config.json")
        model = folder / "config.json"
        content = parse_json(read_small(model), str(model)) if model.is_file() else {}
        self._model: dict[str, Any] = content if isinstance(content, dict) else {}
        self.class_name = self._class()

    def _object(self, name: str) -> dict[str, Any]:
        content = parse_json(self.files[name], str(self.path / name)) if name in self.files else {}
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: expected an object with keys")
        return content

    def _class(self) -> str:
        """The class that transformers 5 takes for this folder, or "" where it takes the files as they are.

        Classes bring their own way of cutting text, whatever tokenizer.json says.
        """
        name = self.config.get("tokenizer_class") or self._model.get("tokenizer_class")
        name = name.removesuffix("Fast") if isinstance(name, str) else ""
        family = self._model.get("model_type")
        if family == "qwen2":  # whatever the files name
            return "Qwen2Tokenizer"
        if family == "qwen3":
            return name or "Qwen2Tokenizer"
        if name == "LlamaTokenizer" and b'"ByteLevel"' in self.files.get("tokenizer.json", b""):
            return ""  # a Llama 3
        return "" if family == "mistral" else name

    def special(self, name: str) -> str | None:
        """The text of "bos_token", "eos_token" and so on, or None if the tokenizer has none."""
        for source in (self._map, self.config, _CLASS_DEFAULTS.get(self.class_name, {})):
            if name in source:
                token = source[name]
                token = token.get("content") if isinstance(token, dict) else token
                return token if isinstance(token, str) else None
        return None

    @functools.cached_property
    def named(self) -> dict[str, str]:
        """The special tokens that have a name: what a chat template sees of them."""
        return {name: text for name in NAMES if (text := self.special(name)) is not None}

    @functools.cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Tokens that these files add to the vocabulary's: text -> {"id", "special", ...}. Those of tokenizer.json are
        not among them.
        """
        found: dict[str, dict[str, Any]] = {}
        special = {*self.named.values(), *self.more_special}
        for text, number in ({} if self._listed else self._object("added_tokens.json")).items():
            found[text] = {"id": number, "special": text in special}
        decoder = self.config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise UserError(f"{self.path / 'tokenizer_config.json'}: added_tokens_decoder must be an object")
        for number, token in decoder.items():
            if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not number.isdigit():
                raise UserError(f"{self.path / 'tokenizer_config.json'}: added token {number!r} is not one")
            found[token["content"]] = {**token, "id": int(number)}
        for text, token in found.items():
            if not text or not isinstance(token["id"], int) or isinstance(token["id"], bool) or token["id"] < 0:
                raise UserError(f"{self.path}: the added token {text!r} has no id that can be one")
        return found

    @functools.cached_property
    def more_special(self) -> list[str]:
        """Special tokens without a name of their own, or with one that few models have (image_token)."""
        found: list[str] = []
        for source in (self._map, self.config):
            for key, tokens in source.items():
                if key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
                    tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
                elif not key.endswith("_token") or key in NAMES or isinstance(tokens, bool):
                    continue
                for token in tokens if isinstance(tokens, list) else [tokens]:
                    text = token.get("content") if isinstance(token, dict) else token
                    found += [text] if isinstance(text, str) and text and text not in found else []
        return found

    def flags_of(self, name: str) -> dict[str, bool]:
        """What the files say of a named special token beside its text: whether spaces around it belong to it."""
        token = next((source[name] for source in (self._map, self.config) if name in source), None)
        return {key: bool(token.get(key)) for key in FLAGS} if isinstance(token, dict) else {}

    # --- roles

    def ids_of(self, key: str) -> list[int]:
        """What config.json and generation_config.json say under "eos_token_id" and the like: none, one or
        several ids.
        """
        found = []
        for source in (self._generation, self._model):
            value = source.get(key)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool) and number >= 0 and number not in found:
                    found.append(number)
        return found

    @functools.cached_property
    def turn_end(self) -> str | None:
        """The special token that the chat template writes after an answer, or None if there is no template or it writes
        none.
        """
        if self.template is None or importlib.util.find_spec("jinja2") is None:
            return next((text for text in self.named.values() if text in TURN_ENDS), None)
        try:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
            after = self.chat(messages, add_generation_prompt=False).rpartition(_PROBE)[2].lstrip()
        except UserError:  # it will be said when the template is used
            return None
        known = {*self.named.values(), *self.added, *self.vocabulary_tokens}
        return max((text for text in known if text and after.startswith(text)), key=len, default=None)

    vocabulary_tokens: tuple[str, ...] = ()  # the added tokens of tokenizer.json, which its reader fills in

    def document_end(self, has_token: Any) -> str | None:
        """The token that ends a document, or None. has_token: says whether the vocabulary has a token of some text.

        The `eos_token`, unless that ends a turn and the vocabulary has one of the known ends of a document beside it.
        """
        eos = self.special("eos_token")
        eos = eos if eos is not None and has_token(eos) else None
        if eos is not None and eos != self.turn_end and eos not in TURN_ENDS:
            return eos
        other = next((text for text in DOCUMENT_ENDS if text != self.turn_end and has_token(text)), None)
        return other or eos

    # --- the chat template

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template that transformers takes, or None."""
        if "chat_template.jinja" in self.files:
            try:
                return self.files["chat_template.jinja"].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path / 'chat_template.jinja'}: not UTF-8 at byte {error.start}") from None
        template = self.config.get("chat_template") or self._object("chat_template.json").get("chat_template")
        if isinstance(template, list):
            named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
            if "default" not in named and named:
                raise UserError(f"{self.path}: several chat templates, none of them named 'default'")
            template = named.get("default")
        return template if isinstance(template, str) else None

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Messages of {"role", "content"} in the chat template. Raises UserError if there is none or it fails."""
        if self.template is None:
            raise UserError("the tokenizer has no chat template: leave out `chat`")
        return render_chat(self.template, messages, add_generation_prompt, self.named)

    # --- what is written with a model

    def files_with_stops(self, stops: list[int]) -> dict[str, bytes]:
        """The files, with these ids in generation_config.json as those that end a text."""
        generation = {**self._generation, "eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else None
        if generation is None or generation == self._generation:
            return self.files
        return {**self.files, "generation_config.json": json_bytes(generation)}


def special_in(text: str, tokens: tuple[str, ...]) -> str | None:
    """The first of some special tokens that is written out in a text, or None."""
    found = _finder(tokens).search(text) if tokens else None
    return found.group() if found else None


@functools.lru_cache(maxsize=16)
def _finder(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def say_other_id(path: Path, text: str, wanted: int, number: int | None) -> None:
    """Say that an added token has another id than a file gives it."""
    notice(
        f"{path}: the added token {text!r} has id {number}, as in transformers, and not the {wanted} that is written "
        "there"
    )
