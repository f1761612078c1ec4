"""How documents become sequences of tokens: what stands before a text, and what ends a document, a turn and a generated
text.

One rule for every program. A document is the ids that the tokenizer puts before a text (a beginning of text, where the
model has one), its own ids, and the id that ends a document. Data files carry the rule's number.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llm_common.errors import UserError
from llm_common.text.hf_tokenizer import AnyTokenizer
from llm_common.text.tokenizer_folder import special_in
from llm_common.text.words import clean

RULE = 2  # 1: nothing before a document, and a chat model's end of turn after it
AUTO = "auto"  # the token is found from the tokenizer's files


def resolve_token(tokenizer: AnyTokenizer, text: str, flag: str) -> int | None:
    """The id of a token given as its text, as its id, or as "none". Raises UserError if there is no such token."""
    if text.lower() == "none":
        return None
    found = tokenizer.token_id(text)
    if found is None and text.isdecimal() and len(text) < 10 and int(text) < tokenizer.vocab_size:
        found = int(text)
    if found is None:
        known = ", ".join(list(tokenizer.special_tokens)[:12]) or "none"
        raise UserError(f"{flag} {clean(text)[:100]}: the tokenizer has no such token; its special tokens: {known}")
    return found


class DocumentEncoder:
    """Turns documents into ids: prefix, text, end.

    end: the token that ends a document, by its text or id; "auto": the one that the tokenizer's files name; "none":
    none. parse_special: whether special tokens written out in a text are those tokens; as a rule text is data, and they
    are text. Raises UserError if the files name no end: documents would run together without a word.
    """

    def __init__(self, tokenizer: AnyTokenizer, end: str = AUTO, parse_special: bool = False) -> None:
        self.tokenizer, self.parse_special = tokenizer, parse_special
        self.prefix = list(tokenizer.prefix_ids)
        self.end = tokenizer.end_of_text if end == AUTO else resolve_token(tokenizer, end, "`document_end`")
        if end == AUTO and self.end is None:
            known = ", ".join(list(tokenizer.special_tokens)[:12])
            raise UserError(
                "the tokenizer names no token that ends a document: give one with `document_end` TOKEN"
                + (f" (it has {known})" if known else "")
                + ", or `document_end` none to let documents run into each other"
            )
        self.ends_inside = 0  # how often the end stood within a document, where it would cut it

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, self.parse_special)
        if self.end is None:
            return self.prefix + ids
        self.ends_inside += ids.count(self.end)
        return [*self.prefix, *ids, self.end]

    def describe(self) -> dict[str, Any]:
        """What a data file records of how it was made."""
        return {
            "rule": RULE,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.tokenizer.vocab_size,
            "prefix": self.prefix,
            "document_end": self.end,
            "document_ends_inside": self.ends_inside,
            "special_tokens_in_text": self.parse_special,
        }


def answer_encoder(
    tokenizer: AnyTokenizer, end: str = AUTO, parse_special: bool = False
) -> Callable[[str, str], tuple[list[int], list[int]]]:
    """A function of a prompt and its answer: the ids of both, tokenized as one text, and divided where the answer
    begins.

    A token that has characters of both belongs to the answer. end: the token that ends an answer, as for
    `DocumentEncoder`.
    """
    last = tokenizer.turn_end if end == AUTO else resolve_token(tokenizer, end, "`turn_end`")
    if end == AUTO and last is None:
        raise UserError(
            "the tokenizer names no token that ends an answer: give one with `turn_end` TOKEN, or `turn_end` none "
            "for a model "
            "that never ends"
        )
    ends = [] if last is None else [last]

    def encode(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        prompt, answer = clean(prompt), clean(answer)
        head, tail = split_ids(tokenizer, prompt + answer, len(prompt), parse_special)
        return tokenizer.prefix_ids + head, tail + ends

    return encode


def split_ids(tokenizer: AnyTokenizer, text: str, at: int, parse_special: bool = True) -> tuple[list[int], list[int]]:
    """The ids of a text, those whose characters all lie before `at` apart from the others."""
    ids, ends = tokenizer.encode_with_ends(text, parse_special)
    n = next((i for i, end in enumerate(ends) if end > at), len(ids))
    return ids[:n], ids[n:]


def encode_conversation(
    tokenizer: AnyTokenizer, render: Callable[..., tuple[str, int]], texts: Sequence[str], parse_special: bool = False
) -> tuple[list[int], list[int]]:
    """The ids of what `render(*texts)` writes, a conversation and a place in it, before and from that place.

    The whole is tokenized, as transformers does it. A special token that one of the texts has written out stays text,
    unless `parse_special`: the texts are then rendered with a mark in each such token, which goes when only the
    template's own tokens have become ids. Raises UserError for a tokenizer that gives a text other ids when it is cut
    there.
    """
    tokens = tuple(tokenizer.special_tokens)
    met = next((found for text in texts if (found := special_in(text, tokens)) is not None), None)
    if parse_special or met is None:
        return split_ids(tokenizer, *render(*texts))
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in texts))

    def replaced(text: str, by: Callable[[str], str]) -> str:
        while (found := special_in(text, tokens)) is not None:
            text = text.replace(found, by(found))
        return text

    def in_pieces(text: str) -> list[int]:
        ids = []
        while text:
            found = special_in(text, tokens)
            before, _, text = text.partition(found) if found is not None else (text, "", "")
            ids += tokenizer.encode(before.replace(mark, ""), parse_special=False)
            ids += [] if found is None else [tokenizer.special_tokens[found]]
        return ids

    without, _ = render(*(replaced(text, lambda found: "") for text in texts))
    if min(map(len, tokens)) < 2 or in_pieces(without) != tokenizer.encode(without):
        raise UserError(
            f"{met!r} stands in a text and is a special token, which this tokenizer cannot take as text here; remove "
            "it, or pass "
            "`special_tokens_in_text` to make it the token"
        )
    whole, at = render(*(replaced(text, lambda found: found[0] + mark + found[1:]) for text in texts))
    return in_pieces(whole[:at]), in_pieces(whole[at:])
