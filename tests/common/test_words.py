"""Cutting texts into words: the `regex` library as the oracle, over every character; cuts, blocks and streams."""

import functools

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from llm_common.text.corpus import python_documentation
from llm_common.text.words import (
    PATTERNS,
    SMALL_BLOCK,
    Words,
    blocks,
    clean,
    last_cut,
    next_cut,
    stream_blocks,
    without_possessive,
    write_out,
)

SAMPLE = (
    "It's 1234 o'clock\u00a0— «Привет,\r\n\r\n  мир»!!\n\n你好，世界。 नमस्ते e\u0301 ½ ² Ⅷ 𝔘nicode 😀👩‍👩‍👧 'LL 'ſ  \t "
    "x  7  "
)
ALPHABET = st.sampled_from("ab é你😀'7½²!\n\t𝔘\u0301 ")


@functools.cache
def every_character() -> str:
    """All code points but surrogates, without those that a later Unicode than ours has made letters or numbers."""
    ours = {name: regex.compile(write_out(name)) for name in (r"\p{L}", r"\p{N}")}
    theirs = {name: regex.compile(name) for name in ours}
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    kept = [c for c in characters if all(bool(theirs[x].match(c)) == bool(ours[x].match(c)) for x in ours)]
    assert len(characters) - len(kept) < 30_000
    assert not any(ours[x].match(c) for c in set(characters) - set(kept) for x in ours if not theirs[x].match(c))
    return "".join(kept)


@pytest.mark.parametrize("name", PATTERNS)
def test_words_of_every_character_are_those_of_the_pattern(name):
    pattern = regex.compile(PATTERNS[name])
    for text in (every_character(), every_character()[::-1], SAMPLE, "a".join(every_character()[:0x3000])):
        assert Words(PATTERNS[name])(text) == pattern.findall(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_words_of_real_texts_are_those_of_the_pattern(name):
    pattern, words = regex.compile(PATTERNS[name]), Words(PATTERNS[name])
    for _, text in zip(range(80), python_documentation(), strict=False):
        assert words(text) == pattern.findall(text)
        mixed = text + SAMPLE + text  # long, with characters beyond U+FFFF in some of its blocks
        assert words(mixed * 3) == pattern.findall(mixed * 3)
    assert len(mixed * 3) > 2 * SMALL_BLOCK


@pytest.mark.parametrize("name", PATTERNS)
@given(text=st.text(ALPHABET, max_size=60), size=st.integers(1, 30))
def test_blocks_have_the_words_of_the_text(name, text, size):
    words = Words(PATTERNS[name])
    found = list(blocks(text, size))
    assert [word for block in found for word in words(block)] == words(text)
    assert "".join(found) == text
    assert without_possessive(PATTERNS[name]).count("++") == 0
    assert regex.findall(without_possessive(PATTERNS[name]), text) == words(text)


@given(text=st.text(ALPHABET, max_size=40), at=st.integers(0, 40))
def test_cuts_lie_behind_a_letter_or_number(text, at):
    for cut in (next_cut(text, at), last_cut(text, at)):
        assert 0 <= cut <= len(text)
        if 0 < cut < len(text):
            assert regex.match(r"\p{L}(?!\p{L})|\p{N}(?!\p{N})", text[cut - 1 : cut + 1])


@given(
    chunks=st.lists(st.sampled_from(["ab ", "a", "<|", "|>", "<|end|>", "<|end|>>", " ", "é", "!", "7"]), max_size=20)
)
def test_a_stream_cuts_no_special_token(chunks):
    special = ("<|end|>", "<|end|>>")
    whole = list(stream_blocks(["".join(chunks)], special, 10**9))
    found = list(stream_blocks(chunks, special, 4))
    assert "".join(found) == "".join(chunks)
    assert [x for x in found if x in special] == [x for x in whole if x in special]


def test_a_stream_is_held_back_no_further_than_needed():
    asked = 0

    def texts():
        nonlocal asked
        for _ in range(1000):
            asked += 1
            yield "word, "

    next(iter(stream_blocks(texts(), (), 600)))
    assert asked <= 101


def test_halves_of_surrogate_pairs():
    assert clean("a\ud83d\ude00b") == "a😀b"
    assert clean("a\ud83db\ude00") == "a\ufffdb\ufffd"
    assert clean("é😀") == "é😀"
