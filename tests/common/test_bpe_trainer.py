"""The trainer: the definition as its oracle, whatever the rule for ties, the way of merging and the number of
processes.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_common.errors import UserError
from llm_common.text import bpe_reference, bpe_trainer
from llm_common.text.bpe_trainer import TIE_RULES, count_words, learn_merges, train_bpe
from llm_common.text.corpus import python_documentation
from llm_common.text.tokenizer import END_OF_TEXT
from llm_common.text.words import PATTERNS

TEXTS = [text for _, text in zip(range(60), python_documentation(), strict=False)]


@given(
    texts=st.lists(st.text(st.sampled_from("ab é你😀'"), max_size=120), min_size=1, max_size=4),
    n=st.integers(1, 60),
    many=st.sampled_from((0, 2, 200)),
    tie_rule=st.sampled_from(TIE_RULES),
)
def test_merges_are_those_of_the_definition(texts, n, many, tie_rule):
    expected = bpe_reference.train(texts, n, END_OF_TEXT, smaller_ids=tie_rule == "smaller-ids")
    words = count_words(texts, [END_OF_TEXT], "gpt2")
    assert learn_merges(words, n, tie_rule, many=many) == expected


@given(rows=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40)), min_size=1, max_size=12))
def test_rows_of_one_letter_are_merged_from_the_left(rows):
    text = " ".join(letter * n for letter, n in rows)
    expected = bpe_reference.train([text], 20, END_OF_TEXT)
    for many in (0, 200):
        assert learn_merges(count_words([text], [], "gpt2"), 20, many=many) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_real_text_gives_the_merges_of_the_definition(pattern):
    found = train_bpe(TEXTS[:12], 256 + 150 + 1, pattern=pattern).merges
    assert found == bpe_reference.train(TEXTS[:12], 150, END_OF_TEXT, PATTERNS[pattern])


def test_any_number_of_processes_counts_the_same():
    one = count_words(TEXTS, [END_OF_TEXT], "gpt2")
    assert sum(one.values()) > 5_000
    assert count_words(TEXTS, [END_OF_TEXT], "gpt2", processes=2) == one


def test_counts_beyond_32_bits():
    words = {b"ab": 2**40, b"bc": 2**40 + 1, b"cd": 2**33}
    assert learn_merges(words, 3) == [(b"b", b"c"), (b"a", b"b"), (b"c", b"d")]
    assert learn_merges(words, 3, many=0) == learn_merges(words, 3)


def test_a_dying_worker_ends_the_count(monkeypatch):
    monkeypatch.setattr(bpe_trainer, "_count_in_worker", _die)
    with pytest.raises(UserError, match="process .* ended"):
        count_words(TEXTS, [END_OF_TEXT], "gpt2", processes=2)


def _die(*_):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 256}, "at least 257"),
        ({"special_tokens": ["<a>", "<a>"]}, "'<a>' is there twice"),
        ({"special_tokens": [""]}, "at least one character"),
        ({"special_tokens": ["a"]}, "single byte"),
        ({"texts": []}, "no text"),
        ({"texts": ["", END_OF_TEXT]}, "no text"),
        ({"tie_rule": "first"}, "tie rule 'first'"),
        ({"pattern": "gpt5"}, "unknown pattern 'gpt5'"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        train_bpe(**({"texts": ["some text"], "vocab_size": 300} | arguments))


def test_pairs_run_out():
    assert train_bpe(["abab"], 300).merges == [(b"a", b"b"), (b"ab", b"ab")]


def test_with_smaller_ids_the_merges_are_those_of_rustbpe():
    rustbpe = pytest.importorskip("rustbpe")
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator(iter(TEXTS), 700, pattern=PATTERNS["gpt2"])
    expected = [bytes(token) for token, _ in oracle.get_mergeable_ranks()][256:]
    merges = train_bpe(TEXTS, 701, tie_rule="smaller-ids").merges
    assert [a + b for a, b in merges] == expected
