"""A byte-level BPE tokenizer: any text to ids and back.

Text is cut by a pattern into words (`words.py`), each word becomes its UTF-8 bytes, and the merges are replayed on it
in the order in which they were learned. Any text can be encoded, and decoding gives it back; half of a surrogate pair,
which is not text, becomes U+FFFD. What is computed, in its plainest form: `bpe_reference.encode`.

Everything here is Python. Where the `tiktoken` package is installed and would give the same ids, large texts go through
it.

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; the byte-level form is GPT-2's (Radford et al. 2019).
"""

import concurrent.futures
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_common.errors import UserError, notice, parse_json, read_small, write_whole
from llm_common.text.bpe_words import REMOVED, WordEncoder
from llm_common.text.tokenizer_folder import TokenizerFolder
from llm_common.text.words import BLOCK, PATTERNS, blocks, clean, special_finder, stream_blocks

END_OF_TEXT = "<|endoftext|>"
FORMAT = 1
FILE_NAME = "bpe.json"
TIKTOKEN_FROM_CHARACTERS = 1 << 20  # characters that a tokenizer has encoded before tiktoken is made ready for more


class Tokenizer(WordEncoder):
    """Byte-level BPE. Ids: 0 to 255 the bytes, then the merges in order, then the special tokens.

    `vocab` (id -> bytes) may be given to use a foreign numbering, such as GPT-2's own files. ignore_merges: a word that
    is a token is that token, whatever the merges would make of it, as in Llama 3. normalization: "NFC" as in Qwen, by
    which some text does not come back; by Python's own tables, in which the newest characters may be missing.
    prompt_prefix: special tokens that a model expects before a text. end_token: the one that ends a document. fast:
    whether tiktoken may be used. special_tokens, added_tokens: texts, or texts with their ids; both are tokens wherever
    a text has them written out, but special ones stand for no text, and `parse_special=False` takes them as text like
    any other. folder: the files that the tokenizer was read from.

    A foreign vocabulary may lack single bytes; text loses those, as with Hugging Face's library.
    """

    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        pattern: str = "gpt2",
        vocab: dict[int, bytes] | None = None,
        ignore_merges: bool = False,
        normalization: str | None = None,
        prompt_prefix: Iterable[str] = (),
        end_token: str = END_OF_TEXT,
        fast: bool = True,
        added_tokens: Iterable[str] = (),
        folder: TokenizerFolder | None = None,
    ) -> None:
        if pattern not in PATTERNS:
            raise UserError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
        if normalization not in (None, "NFC"):
            raise UserError(f"normalization {normalization!r}: only NFC is known")
        self.merges, self.pattern, self.ignore_merges, self.fast = list(merges), pattern, ignore_merges, fast
        self.normalization, self.prompt_prefix, self.end_token = normalization, tuple(prompt_prefix), end_token
        if vocab is None:
            made = [a + b for a, b in self.merges]
            if len(set(made)) < len(made):
                twice = next(token for i, token in enumerate(made) if token in made[:i])
                raise UserError(f"two merges make {twice!r}, which would have two ids; give a vocab that says which")
            vocab = dict(enumerate([bytes([b]) for b in range(256)] + made))
        self.vocab, self.folder = dict(vocab), folder
        self.special_tokens, self.added_tokens = self._take(special_tokens), self._take(added_tokens)
        self.added = {**self.special_tokens, **self.added_tokens}
        for text, i in self.added.items():
            self.vocab[i] = text.encode()
        apart = set(self.added.values())
        self._plain = {token: i for i, token in self.vocab.items() if i not in apart}
        self._id = {self.vocab[i]: i for i in apart} | self._plain
        self._byte_ids = [self._id.get(bytes([b]), REMOVED) for b in range(256)]
        self._lacks_bytes = REMOVED in self._byte_ids
        if self._lacks_bytes and folder is None:
            missing = self._byte_ids.index(REMOVED)
            raise UserError(f"vocabulary lacks the single byte {missing:#04x}: some text could not be encoded")
        self._prepare_words()
        self._finders = {True: special_finder(self.added), False: special_finder(self.added_tokens)}
        self._encoded = 0  # characters so far

    def _take(self, tokens: Iterable[str]) -> dict[str, int]:
        """Ids of added tokens: those given, else the vocabulary's, else new ones after its end."""
        known = {token: i for i, token in self.vocab.items()}
        free, out = max(self.vocab, default=-1) + 1, {}
        for text in tokens:
            if not text:
                raise UserError("a special token must have at least one character")
            given = tokens[text] if isinstance(tokens, Mapping) else known.get(text.encode())
            if given is None:
                given, free = free, free + 1
                self.vocab[given] = text.encode()
            out[text] = given
        return out

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what an embedding table needs."""
        return max(self.vocab) + 1

    @property
    def plain_vocab_size(self) -> int:
        """One more than the largest id that a text without added tokens can have."""
        return max(self._plain.values(), default=-1) + 1

    # What a document, a turn and a generated text end with; `TokenizerFolder` says more of the three.

    @property
    def end_of_text(self) -> int | None:
        """The id of the token that ends a document, or None."""
        return self.added.get(self.end_token)

    @property
    def turn_end(self) -> int | None:
        """The id that ends an answer, or None."""
        if self.folder is None:
            return self.end_of_text
        return next(
            (
                self.added[text]
                for text in (self.folder.turn_end, self.folder.special("eos_token"))
                if text in self.added
            ),
            None,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text that is generated."""
        if self.folder is None:
            return () if self.end_of_text is None else (self.end_of_text,)
        own = self.added.get(self.folder.special("eos_token") or "")
        return tuple(dict.fromkeys(self.folder.ids_of("eos_token_id") + ([] if own is None else [own])))

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that a model expects before a text."""
        return [self.added[token] for token in self.prompt_prefix]

    @property
    def context_ids(self) -> list[int]:
        """What a text's first token is predicted from: the prefix, else the beginning of text, else the end (as lm-eval
        does).
        """
        if self.prompt_prefix or self.folder is None:
            return self.prefix_ids or ([] if self.end_of_text is None else [self.end_of_text])
        names = (self.folder.special("bos_token"), self.folder.special("eos_token"))
        return [self.added[text] for text in names if text in self.added][:1]

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text, or None."""
        return None if clean(text) != text else self.added.get(text, self._plain.get(text.encode()))

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Messages of {"role", "content"} in the folder's chat template. Raises UserError if it has none or it
        fails.
        """
        if self.folder is None:
            raise UserError("the tokenizer has no chat template: `chat` needs that of a Hugging Face folder")
        return self.folder.chat(messages, add_generation_prompt)

    # --- encode and decode

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a text. parse_special: whether special tokens written out in it become their ids, or are text like any
        other.
        """
        text, finder = clean(text), self._finders[parse_special]
        if finder is None or finder.search(text) is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for i, part in enumerate(finder.split(text)):
            if i % 2:
                ids.append(self.added[part])
            elif part:
                ids += self._encode_ordinary(part)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of several texts; through tiktoken on all cores."""
        texts = list(texts)
        if not self.fast or sum(map(len, texts)) < TIKTOKEN_FROM_CHARACTERS or self._tiktoken is None:
            return [self.encode(text) for text in texts]
        self._encoded = TIKTOKEN_FROM_CHARACTERS + 1
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_iterable(self, texts: Iterable[str], block: int = BLOCK) -> Iterator[int]:
        """The ids of the concatenation of `texts`, lazily; equal to `encode("".join(texts))`, in memory that does not
        grow with it.

        block: how many characters are waited for before some are encoded.
        """
        for part in stream_blocks(texts, self.added, block):
            yield from ([self.added[part]] if part in self.added else self._encode_ordinary(clean(part)))

    def encode_with_ends(self, text: str, parse_special: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a text, and for each the place in the text (clean of half surrogates) where its characters end."""
        text = clean(text)
        ids, normal = self.encode(text, parse_special), self._normalized(text)
        # where the character ends that each byte with a token belongs to
        places = [i + 1 for i, c in enumerate(normal) for b in c.encode("utf-8") if self._byte_ids[b] != REMOVED]
        ends, at = [], 0
        for i in ids:
            at += len(self.vocab[i])
            ends.append(places[min(at, len(places)) - 1] if places else 0)
        return ids, ends if normal == text else [_place_before(end, normal, text) for end in ends]

    def _normalized(self, text: str) -> str:
        return text if self.normalization is None else unicodedata.normalize("NFC", text)

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        text = self._normalized(text)
        self._encoded += len(text)
        if not self.fast or self._encoded <= TIKTOKEN_FROM_CHARACTERS or self._tiktoken is None:
            return self._encode_plain(text)
        if len(text) <= BLOCK:
            return self._tiktoken.encode_ordinary(text)
        ids: list[int] = []
        for block in blocks(text):
            # of a longer block, which is one word or a few, it could overflow its stack
            ids += self._tiktoken.encode_ordinary(block) if len(block) <= 2 * BLOCK else self._encode_plain(block)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids; a prefix of a text may end in the middle of a character."""
        try:
            return b"".join(self.vocab[int(i)] for i in ids)
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is not in the vocabulary of {len(self.vocab)} tokens") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8, and ids without a token, become U+FFFD."""
        replacement = "\ufffd".encode()
        return b"".join(self.vocab.get(int(i), replacement) for i in ids).decode("utf-8", errors="replace")

    def encode_prompt(self, text: str, parse_special: bool = True) -> list[int]:
        """The ids from which a model continues a text, with what it expects before it."""
        return self.prefix_ids + self.encode(text, parse_special)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 (vocab_size,); 0 for special tokens. Other added tokens are
        text.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for i, token in self.vocab.items():
            lengths[i] = len(token)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    # --- files

    def to_json(self) -> str:
        """The contents of the file that `save` writes."""
        content = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "merges": [f"{a.hex()} {b.hex()}" for a, b in self.merges],
            "vocab": {i: token.hex() for i, token in self.vocab.items()},
        }
        # left out where they say nothing, so that files and fingerprints of plain tokenizers stay as they were
        content |= {"ignore_merges": True} if self.ignore_merges else {}
        content |= {"normalization": self.normalization} if self.normalization else {}
        content |= {"prompt_prefix": self.prompt_prefix} if self.prompt_prefix else {}
        content |= {"end_token": self.end_token} if self.end_token != END_OF_TEXT else {}
        content |= {"added_tokens": self.added_tokens} if self.added_tokens else {}
        return json.dumps(content, indent=0)

    def fingerprint(self) -> str:
        """sha256 of what `save` writes, or of the foreign file that has the vocabulary: by it token files and
        checkpoints recognise their tokenizer.
        """
        if self.folder is not None:
            files = self.folder.files
            names = ("tokenizer.json",) if "tokenizer.json" in files else ("vocab.json", "merges.txt")
            return hashlib.sha256(b"".join(files[name] for name in names)).hexdigest()
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write one JSON file, whole or not at all; bytes are written as hexadecimal digits."""
        write_whole(Path(path), self.to_json().encode("utf-8"))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file written by `save`. Raises UserError if it is missing, damaged or of a newer format."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer; make one with one-model train-tokenizer")
        try:
            content = parse_json(read_small(path), str(path))
            if content["format"] != FORMAT:
                raise UserError(f"{path}: tokenizer format {content['format']!r}, but this version reads {FORMAT}")
            merges = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in (line.split(" ") for line in content["merges"])]
            vocab = {int(i): bytes.fromhex(token) for i, token in content["vocab"].items()}
            optional = ("ignore_merges", "normalization", "prompt_prefix", "end_token", "added_tokens")
            options = {key: content[key] for key in optional if key in content}
            return cls(merges, content["special_tokens"], content["pattern"], vocab, **options)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a tokenizer file ({type(error).__name__}: {error})") from error


def _place_before(end: int, normal: str, text: str) -> int:
    """The place in a text that becomes the place `end` of its normal form: behind the marks of the last character."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(unicodedata.normalize("NFC", text[:middle])) <= end:
            low = middle
        else:
            high = middle - 1
    return low


class HasVocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def plain_vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...


def check_vocabulary(tokenizer: HasVocabulary, vocab_size: int) -> None:
    """Raise UserError if a model with `vocab_size` embeddings has none for some of the ids that a text can have.

    Added tokens may lie beyond them, as the [PAD] of many models does, which no text contains; that is said.
    """
    if max(tokenizer.plain_vocab_size, 1 + (tokenizer.end_of_text or 0)) > vocab_size:
        raise UserError(
            f"ModelConfig.vocab_size = {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}: "
            "use a larger model vocabulary or train a smaller tokenizer"
        )
    if tokenizer.vocab_size > vocab_size:
        notice(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {vocab_size:,} embeddings: added "
            "tokens beyond "
            "them are refused where a text has one"
        )
