"""The tokenizer: a naive trainer and tiktoken as oracles, and round trips over any text."""

import json

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from llm_common.corpus import python_documentation
from llm_common.errors import UserError
from llm_common.tokenizer import END_OF_TEXT, PATTERNS, Tokenizer, check_vocabulary, train_bpe
from parity import spec_text

TEXT = "low lower lowest, newer newest wider; the widest river's banks they'll widen. 12345 été 你好 🙂\n\n  end"


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request) -> Tokenizer:
    texts = [text for _, text in zip(range(40), python_documentation(), strict=False)]
    return train_bpe([*texts, TEXT], 600, (END_OF_TEXT, "<|user|>"), request.param)


def test_training_is_the_naive_algorithm():
    texts = [TEXT * 3, "aaaa aaa aa abababab", "the cat the cat the hat " * 5]
    assert train_bpe(texts, 256 + 80 + 1).merges == spec_text.train(texts, 80, END_OF_TEXT)


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


def test_encoding_in_pieces_remembers_nothing(tokenizer):
    fresh = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
    assert len(list(fresh.encode_iterable(f"word{i} " for i in range(100)))) > 100
    assert not fresh._cache


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
        (None, "no such tokenizer.*train_tokenizer.py"),
        ("{", "not a tokenizer file"),
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
