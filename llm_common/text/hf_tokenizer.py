"""Hugging Face's tokenizer files, read through the `tokenizers` library.

`HfTokenizer` has the methods that training and generation use of `Tokenizer`, so either can stand for the other.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm_common.errors import UserError, json_bytes, parse_json, require_package
from llm_common.text.tokenizer import FILE_NAME, Tokenizer
from llm_common.text.tokenizer_folder import FILES, FLAGS, TokenizerFolder, say_other_id
from llm_common.text.tokenizer_json import read_hf_folder, to_hf_files
from llm_common.text.tokenizers_library import cut_as_class, probe, quiet, unless_panic
from llm_common.text.words import clean

T = TypeVar("T")


class HfTokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, and what the files beside it say of special tokens.

    Its ids are those that transformers 5 gives, for a text and for a chat.
    """

    def __init__(self, folder: Path) -> None:
        require_package("tokenizers", "hf")
        import tokenizers

        self.folder = TokenizerFolder(folder)
        self.files = self.folder.files
        path = folder / "tokenizer.json"
        if path.name not in self.files:
            raise UserError(
                f"{folder}: has no tokenizer.json; save the tokenizer with transformers as a fast tokenizer"
            )
        content = parse_json(self.files[path.name], str(path))
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise UserError(f"{path}: not a tokenizer (no object with a model)")
        self._probed = probe(path, content)
        with quiet(self._probed):
            try:
                self._tokenizer = tokenizers.Tokenizer.from_str(self.files[path.name].decode("utf-8-sig"))
            except Exception as error:  # the library raises plain exceptions
                raise UserError(f"{path}: not a tokenizer ({str(error)[:300]})") from None
            except BaseException as error:
                raise unless_panic(error, f"{path}: not a tokenizer") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if content["model"].get("type", "BPE") == "BPE":
            cut_as_class(self._tokenizer, self.folder, content)
        self._add_tokens()
        self._added = dict(self._tokenizer.get_added_tokens_decoder())
        self.folder.vocabulary_tokens = tuple(token.content for token in self._added.values())
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self._byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
        self.token_ids: dict[str, Any] = {}  # the keys of config.json that name special tokens
        for name in ("bos_token", "pad_token"):
            found = self.folder.ids_of(f"{name}_id")[:1] or self._ids([self.folder.special(name)])
            self.token_ids |= {f"{name}_id": found[0]} if found else {}
        self.prefix_ids = self._prefix()

    def _add_tokens(self) -> None:
        """Add the tokens that other files than tokenizer.json name, as transformers does."""
        import tokenizers

        have = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        listed = sorted(self.folder.added.items(), key=lambda item: item[1]["id"])
        named = [(text, {"special": True, **self.folder.flags_of(name)}) for name, text in self.folder.named.items()]
        more = [(text, {"special": True}) for text in self.folder.more_special]
        for text, token in [*listed, *named, *more]:
            flags = {key: bool(token.get(key)) for key in (*FLAGS, "special")}
            known = have.get(text)
            if known is not None and ("id" not in token or all(getattr(known, key) == x for key, x in flags.items())):
                continue
            have[text] = added = tokenizers.AddedToken(text, **flags)
            self._tokenizer.add_tokens([added])
            wanted, number = token.get("id"), self._tokenizer.token_to_id(text)
            if wanted is not None and wanted != number:
                say_other_id(self.folder.path, text, wanted, number)

    def _ids(self, texts: Iterable[str | None]) -> list[int]:
        found = (self._tokenizer.token_to_id(text) for text in texts if text is not None)
        return [i for i in found if i is not None]

    def _prefix(self) -> list[int]:
        """The ids that transformers puts before a text."""
        if self._tokenizer.post_processor is None:  # add_bos_token counts only for folders without a tokenizer.json
            return []
        with_them, without = (self._tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        n = len(without)
        return next((with_them[:i] for i in range(len(with_them) - n + 1) if with_them[i : i + n] == without), [])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def plain_vocab_size(self) -> int:
        """One more than the largest id that a text without added tokens can have."""
        return max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text that is generated: those of the configs and the tokenizer's own. Chat models have
        several.
        """
        found = self.folder.ids_of("eos_token_id") + self._ids([self.folder.special("eos_token")])
        return tuple(dict.fromkeys(found))

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, or None."""
        text = self.folder.document_end(lambda text: self._tokenizer.token_to_id(text) is not None)
        return None if text is None else self._tokenizer.token_to_id(text)

    @property
    def turn_end(self) -> int | None:
        """The id that ends an answer: what the chat template writes there, else the tokenizer's end of text; or
        None.
        """
        return next(iter(self._ids([self.folder.turn_end, self.folder.special("eos_token")])), None)

    @property
    def context_ids(self) -> list[int]:
        """What a text's first token is predicted from: the prefix, else the beginning of text, else the end (as lm-eval
        does).
        """
        return self.prefix_ids or self._ids([self.folder.special("bos_token"), self.folder.special("eos_token")])[:1]

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text, or None."""
        return None if clean(text) != text else self._tokenizer.token_to_id(text)

    # --- encode and decode

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a text, without the tokens that a model expects around it.

        parse_special: whether special tokens written out in it become their ids; otherwise they are text like any
        other.
        """
        return self._encode(text, parse_special).ids

    def encode_with_ends(self, text: str, parse_special: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a text, and for each the place in the text (clean of half surrogates) where its characters end."""
        found = self._encode(text, parse_special)
        return found.ids, [end for _, end in found.offsets]

    def _encode(self, text: str, parse_special: bool) -> Any:
        text = clean(text)
        return self._library(lambda: self._split_special(parse_special).encode(text, add_special_tokens=False))

    def _split_special(self, parse_special: bool) -> Any:
        parse_special = parse_special and not self.folder.config.get("split_special_tokens")
        if self._tokenizer.encode_special_tokens == parse_special:
            self._tokenizer.encode_special_tokens = not parse_special
        return self._tokenizer

    def _library(self, call: Callable[[], T]) -> T:
        """What a call of the library gives; its panics, which are no Exception, become errors."""
        with quiet(self._probed):
            try:
                return call()
            except Exception as error:
                raise UserError(
                    f"{self.folder.path / 'tokenizer.json'}: cannot encode this text ({str(error)[:200]})"
                ) from None
            except BaseException as error:
                raise unless_panic(error, f"{self.folder.path / 'tokenizer.json'}: cannot encode this text") from None

    def encode_prompt(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a text that is to be continued, with the tokens that the model expects before it, as transformers
        gives them.
        """
        return self.prefix_ids + self.encode(text, parse_special)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are written out."""
        ids = [int(i) for i in ids]
        if not self._byte_level:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        # The library takes an added token's letters for bytes; so only what lies between them goes through it. A
        # character's bytes never lie on both sides of one.
        out, run = [], []
        for i in [*ids, None]:
            if i is not None and i not in self._added:
                run.append(i)
                continue
            out.append(self._tokenizer.decode(run, skip_special_tokens=False) if run else "")
            run = []
            out.append("" if i is None else self._added[i].content)
        return "".join(out)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 (vocab_size,); 0 for special tokens. Other added tokens are
        text.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        metaspace = "\u2581" in json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"), ensure_ascii=False)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in self._added:
                lengths[i] = 0 if self._added[i].special else len(token.encode("utf-8"))
            elif not metaspace:  # byte-level: one character for each byte
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
        return self.folder.chat(messages, add_generation_prompt)


AnyTokenizer = Tokenizer | HfTokenizer


def open_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer of a `bpe.json`, of a `tokenizer.json`, of a folder with one of them or with GPT-2's vocab.json and
    merges.txt, or of a run's newest checkpoint.
    """
    if path.is_dir():
        tokenizer = load_tokenizer(path)
        steps = sorted(path.glob("step-*/state.json"))
        if tokenizer is None and steps:  # a run's folder
            tokenizer = load_tokenizer(steps[-1].parent)
        if tokenizer is None:
            raise UserError(
                f"{path}: has neither {FILE_NAME} nor tokenizer.json nor vocab.json and merges.txt; "
                "give a tokenizer with `tokenizer`"
            )
        return tokenizer
    return _open_hf(path.parent) if path.name == "tokenizer.json" and path.is_file() else Tokenizer.load(path)


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


def companions(tokenizer: AnyTokenizer, stops: Iterable[int] = ()) -> dict[str, bytes]:
    """The files that let this program and transformers load the tokenizer from a checkpoint: name -> contents.

    stops: further ids at which generation ends, beside the tokenizer's own.
    """
    every = stop_ids(tokenizer, stops)
    if isinstance(tokenizer, HfTokenizer):
        return tokenizer.folder.files_with_stops(every)
    if tokenizer.folder is not None:
        return tokenizer.folder.files_with_stops(every)
    generation = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": every[0] if len(every) == 1 else every}
    files = {"generation_config.json": json_bytes(generation)} if every else {}
    return {FILE_NAME: tokenizer.to_json().encode("utf-8"), **to_hf_files(tokenizer), **files}


def stop_ids(tokenizer: AnyTokenizer, more: Iterable[int] = ()) -> list[int]:
    """Every id at which generation ends: the tokenizer's and the configs', and those that answers were trained to end
    with.
    """
    return list(dict.fromkeys([*tokenizer.eos_ids, *more]))


def token_ids(tokenizer: AnyTokenizer, stops: Iterable[int] = ()) -> dict[str, Any]:
    """The keys of config.json that name special tokens. Left out, transformers would assume Llama 2's."""
    every = stop_ids(tokenizer, stops)
    ends = {"eos_token_id": None if not every else every[0] if len(every) == 1 else every}
    if isinstance(tokenizer, HfTokenizer):
        return {"bos_token_id": None, **tokenizer.token_ids, **ends}
    first = tokenizer.prefix_ids
    return {"bos_token_id": first[0] if first else tokenizer.end_of_text, **ends}


__all__ = [
    "FILES",
    "AnyTokenizer",
    "HfTokenizer",
    "companions",
    "load_tokenizer",
    "open_tokenizer",
    "stop_ids",
    "token_ids",
]
