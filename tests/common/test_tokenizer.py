"""The tokenizer: a naive trainer and tiktoken as oracles, and round trips over any text."""

import json

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from llm_common.errors import UserError
from llm_common.text import bpe_reference
from llm_common.text.bpe_trainer import train_bpe
from llm_common.text.corpus import python_documentation
from llm_common.text.tokenizer import END_OF_TEXT, PATTERNS, Tokenizer, check_vocabulary
from llm_common.text.words import clean, stream_blocks

TEXT = "low lower lowest, newer newest wider; the widest river's banks they'll widen. 12345 été 你好 🙂\n\n  end"


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request) -> Tokenizer:
    texts = [text for _, text in zip(range(40), python_documentation(), strict=False)]
    return train_bpe([*texts, TEXT], 600, (END_OF_TEXT, "<|user|>"), request.param)


def test_training_is_the_naive_algorithm():
    texts = [TEXT * 3, "aaaa aaa aa abababab", "the cat the cat the hat " * 5]
    assert train_bpe(texts, 256 + 80 + 1).merges == bpe_reference.train(texts, 80, END_OF_TEXT)


def test_encoding_equals_tiktoken(tokenizer):
    oracle = tiktoken.Encoding(
        "oracle",
        pat_str=PATTERNS[tokenizer.pattern],
        mergeable_ranks={
            token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()
        },
        special_tokens=tokenizer.special_tokens,
    )
    texts = [
        TEXT,
        " " * 300 + "x",
        "a" * 500,
        "can't CAN'T we'll",
        "\r\n\r\n\t x\n",
        "1234567 89",
        f"a{END_OF_TEXT}b",
        "",
    ]
    for text in [*texts, *(t for _, t in zip(range(60), python_documentation(), strict=False))]:
        assert tokenizer.encode(text) == oracle.encode(text, allowed_special="all")


EVERY = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)


def test_every_character_has_the_same_ids_through_tiktoken(tokenizer):
    plain = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern, fast=False)
    texts = [EVERY, TEXT * 50, f"x{END_OF_TEXT}".join(EVERY[:0x4000]), *python_documentation()]
    fast = tokenizer.encode_batch(texts)
    assert tokenizer._tiktoken is not None
    assert [plain.encode(text) for text in texts] == fast
    assert plain.decode(fast[0]) == EVERY
    assert tokenizer.encode(texts[1]) == fast[1]  # through tiktoken, which is ready now


HOSTILE = {
    "one letter": "a" * 50_000,
    "spaces before a letter": " " * 50_000 + "x",
    "newlines": "\n" * 50_000,
    "letters": "".join(chr(97 + i * i * 7 % 26) for i in range(50_000)),
    "combining marks": "e\u0301\u0302" * 20_000,
    "joined emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 3_000,
    "ideographs": "".join(chr(0x4E00 + i * i % 20_000) for i in range(30_000)),
    "bytes": bytes(i * i * 31 % 256 for i in range(50_000)).decode("utf-8", "replace"),
    "special tokens": END_OF_TEXT * 4_000,
    "nearly special tokens": (END_OF_TEXT[:-1] + "<|user|" + END_OF_TEXT) * 1_500,
    "white space": " \t\r\n" * 12_000 + "x",
    "two spaces and a letter": "  a" * 15_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_come_back_the_same_on_every_way(tokenizer, name):
    text = HOSTILE[name]
    plain = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern, fast=False)
    fast = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
    fast._encoded = 1 << 30  # as if it had encoded much
    ids = plain.encode(text)
    assert fast.encode(text) == ids
    assert list(plain.encode_iterable(text[i : i + 7] for i in range(0, len(text), 7))) == ids
    assert plain.decode(ids) == text


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.encode("a\ud800 b") == tokenizer.encode("a\ufffd b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_a_letter_in_halves_is_not_cut_from_the_word_it_is_in(tokenizer):
    text = "ab\ud801\udc00 " * 50  # U+10400, a letter
    words = list(stream_blocks(text, (), 8))
    assert [word for block in words for word in tokenizer._words(clean(block))] == tokenizer._words(clean(text))
    assert list(tokenizer.encode_iterable(iter(text), block=8)) == tokenizer.encode(text)


@given(data=st.data())
def test_a_long_word_is_merged_like_a_short_one(data):
    """With any merges, also such as no training gives: a pair may come up that should have been merged before."""
    tokens, merges = [b"a", b"b", b"c"], []
    for _ in range(data.draw(st.integers(1, 12))):
        pair = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if pair not in merges:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    merges = data.draw(st.permutations(merges))
    vocab = {i: bytes([i]) for i in range(256)}
    vocab |= dict(enumerate(dict.fromkeys(t for t in tokens if len(t) > 1), 256))
    tokenizer = Tokenizer(merges, (), vocab=vocab)
    ids = list(data.draw(st.text(st.sampled_from("abc"), min_size=1, max_size=60)).encode())
    assert tokenizer._merge_long(list(ids)) == tokenizer._merge_short(list(ids))


@given(text=st.text(max_size=60))
def test_decoding_gives_the_text_back(tokenizer, text):
    text = text.encode("utf-8", errors="replace").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    parts=st.lists(
        st.sampled_from(["a", " low", "'", "ll", "<|end", "oftext|>", " ", "\n", "7", "é", "<|user|>"]), max_size=12
    )
)
def test_encoding_in_pieces_equals_encoding_at_once(tokenizer, parts):
    assert list(tokenizer.encode_iterable(parts)) == tokenizer.encode("".join(parts))


def test_special_tokens_are_never_split(tokenizer):
    ids = tokenizer.encode(f"a{END_OF_TEXT}<|user|>")
    assert ids[-2:] == [tokenizer.end_of_text, tokenizer.special_tokens["<|user|>"]]
    assert tokenizer.vocab_size == 600


def test_overlapping_special_tokens_take_the_longer():
    tokenizer = Tokenizer([], ["<|a|>", "<|a|><|b|>"])
    assert tokenizer.encode("<|a|><|b|>") == [tokenizer.special_tokens["<|a|><|b|>"]]


def test_save_and_load_is_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bpe.json")
    loaded = Tokenizer.load(tmp_path / "bpe.json")
    assert (loaded.vocab, loaded.merges, loaded.special_tokens) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.special_tokens,
    )
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such tokenizer.*one-model train-tokenizer"),
        ("{", "cannot be read as JSON"),
        ("[]", "not a tokenizer file"),
        (json.dumps({"format": 99}), "format 99"),
        (
            json.dumps({"format": 1, "merges": ["zz"], "vocab": {}, "pattern": "gpt2", "special_tokens": {}}),
            "not a tokenizer",
        ),
        (
            json.dumps({"format": 1, "merges": [], "vocab": {}, "pattern": "gpt2", "special_tokens": {}}),
            "single byte 0x00",
        ),
    ],
)
def test_a_damaged_file_is_refused(content, words, tmp_path):
    path = tmp_path / "bpe.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        Tokenizer.load(path)


def test_bad_input():
    with pytest.raises(UserError, match="vocab_size = 256 is too small"):
        train_bpe(["abc"], 256)
    with pytest.raises(UserError, match="no text"):
        train_bpe([], 300)
    with pytest.raises(UserError, match="unknown pattern 'x'"):
        Tokenizer([], pattern="x")
    with pytest.raises(UserError, match="id 9999 is not in the vocabulary"):
        Tokenizer([]).decode_bytes([9999])
    with pytest.raises(UserError, match="at least one character"):
        Tokenizer([], [""])
    with pytest.raises(UserError, match="vocab_size = 200 is smaller than the tokenizer's 257"):
        check_vocabulary(Tokenizer([]), 200)


def test_ids_without_a_token_are_shown_as_such():
    assert Tokenizer([]).decode([97, 9999, 98]) == "a\ufffdb"


def test_the_fingerprint_is_that_of_the_contents(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bpe.json")
    assert Tokenizer.load(tmp_path / "bpe.json").fingerprint() == tokenizer.fingerprint()
    assert Tokenizer([]).fingerprint() != tokenizer.fingerprint()


def test_training_stops_when_nothing_is_left_to_merge():
    assert train_bpe(["ab"], 300).merges == [(b"a", b"b")]
