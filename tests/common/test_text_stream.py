"""Text streamed out of token ids: whole characters, stop strings, and in sum the text itself."""

from hypothesis import given
from hypothesis import strategies as st

from llm_common.text.drawn_texts import chunks_ahead
from llm_common.text.text_stream import TextStream
from llm_common.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer([(b"a", b"b"), (b"\xf0", b"\x9f")])


def stream(text: str, stop=(), sizes=(1,)) -> tuple[list[str], TextStream]:
    ids, out, pieces = TOKENIZER.encode(text), TextStream(TOKENIZER, stop), []
    while ids:
        n = sizes[len(pieces) % len(sizes)]
        pieces.append(out.feed(ids[:n]))
        ids = ids[n:]
    pieces.append(out.feed([], last=True))
    return pieces, out


@given(st.text(), st.lists(st.integers(1, 5), min_size=1))
def test_the_pieces_are_the_text(text, sizes):
    text = text.encode("utf-8", "replace").decode()
    pieces, out = stream(text, sizes=sizes)
    assert "".join(pieces) == out.text == text


def test_half_a_character_is_never_given_out():
    pieces, _ = stream("é🙂x")
    assert [piece for piece in pieces if piece] == ["é", "🙂", "x"]


def test_bytes_that_never_become_a_character_come_at_the_end():
    out = TextStream(TOKENIZER)
    assert out.feed([0xF0, 0x9F]) == ""
    assert out.feed([], last=True) == "\ufffd"
    out = TextStream(TOKENIZER)
    assert out.feed([0xFF, *b"ok"]) == "\ufffdok"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_and_is_not_in_it(text, stop):
    pieces, out = stream(text, stop)
    assert "".join(pieces) == out.text
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert out.stopped == bool(ends)
    # the first to be complete as the text grows; of those that end at the same place, the one that begins first
    expected = (
        text
        if not ends
        else min((text[: min(ends)].find(s), text[: min(ends)]) for s in stop if s in text[: min(ends)])
    )
    assert out.text == (text if not ends else expected[1][: expected[0]])


def test_after_a_stop_string_nothing_comes():
    out = TextStream(TOKENIZER, ["STOP"])
    assert out.feed(list(b"one ST")) == "one "
    assert out.feed(list(b"OP two")) == ""
    assert out.stopped
    assert out.feed(list(b" three"), last=True) == ""
    assert out.text == "one "


def test_the_beginning_of_a_stop_string_that_does_not_come_is_given_out():
    pieces, out = stream("one ST", ["STOP"])
    assert out.text == "one ST"
    assert pieces[-1] == "ST"


def test_only_a_device_that_can_wait_for_one_chunk_alone_is_given_the_next():
    ahead = {platform: chunks_ahead(platform) for platform in ("cpu", "mps", "cuda", "gpu", "tpu")}
    assert ahead == {"cpu": 0, "mps": 0, "cuda": 1, "gpu": 1, "tpu": 1}
