"""Tokenizers of Hugging Face folders: the same ids as their own library gives, and ours exported to them."""

import json

import numpy as np
import pytest

from llm_common.errors import UserError
from llm_common.text.bpe_trainer import train_bpe
from llm_common.text.corpus import python_documentation
from llm_common.text.hf_tokenizer import HfTokenizer, companions, load_tokenizer, open_tokenizer, token_ids
from llm_common.text.text_stream import TextStream
from llm_common.text.tokenizer import PATTERNS, Tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "Return a string. Don't panic!\n\n  12345 apples, naïve café\r\n\ttabs",
    "日本語のテキスト 🙂👩‍👩‍👧 Ελληνικά кириллица العربية",
    "a<|endoftext|>b<|endoftext|>",
    " leading",
    "trailing ",
    "",
    "\n",
    "   \n \n  x",
    "I'LL we'Ve 1 22 333 4444",
    "x" * 200,
    "\u2028\u00a0\u3000end",
]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def corpus():
    return [text for _, text in zip(range(300), python_documentation(), strict=False)]


def save(tokenizer: Tokenizer, folder) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in companions(tokenizer).items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_our_tokenizer_exported_gives_the_same_ids(pattern, corpus, tmp_path):
    ours = train_bpe(corpus, 700, pattern=pattern)
    save(ours, tmp_path / "model")
    (tmp_path / "model" / "bpe.json").unlink()
    theirs, auto = HfTokenizer(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.vocab_size, theirs.eos_ids, theirs.end_of_text) == (700, (699,), 699)
    sweep = "".join(chr(i) for i in range(1, 0x3000) if not 0xD800 <= i < 0xE000)
    for text in [*TEXTS, *corpus[:50], sweep]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert auto(text).input_ids == ids
        assert theirs.decode(ids) == text
    np.testing.assert_array_equal(theirs.byte_lengths(), ours.byte_lengths())
    assert auto.eos_token_id == 699


def test_bytes_of_ids_add_up_to_the_text(corpus):
    tokenizer = train_bpe(corpus, 400)
    lengths = tokenizer.byte_lengths()
    for text in TEXTS:
        whole = len(text.replace("<|endoftext|>", "").encode())
        assert lengths[tokenizer.encode(text)].sum() == whole


def sentencepiece_like(folder) -> None:
    """A tokenizer with ▁ for spaces, bytes as a fallback and a beginning of text, as Llama 2's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ["▁", *"abcdehilnorstw", "▁a", "th", "▁th", "he", "▁the", "in"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("h", "e"), ("▁th", "e"), ("i", "n")]
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    t.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))


def test_a_sentencepiece_like_tokenizer(tmp_path):
    sentencepiece_like(tmp_path / "model")
    tokenizer, auto = HfTokenizer(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.encode_prompt("the sin") == auto("the sin").input_ids
    assert tokenizer.encode_prompt("the sin")[0] == 1
    assert 1 not in tokenizer.encode("the sin")
    assert tokenizer.eos_ids == (2,)
    assert token_ids(tokenizer) == {"bos_token_id": 1, "eos_token_id": 2}
    text = "the sin é 🙂 in"
    ids = tokenizer.encode(text)
    assert tokenizer.byte_lengths()[ids].sum() == len(b" " + text.encode())  # the normalizer prepends a space
    stream = TextStream(tokenizer)
    pieces = [stream.feed([i]) for i in ids] + [stream.feed([], last=True)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    half = ids[: ids.index(tokenizer.encode("the sin")[-1]) + 1]  # a continuation keeps the space of its first word
    stream = TextStream(tokenizer, prompt=half)
    rest = "".join([stream.feed([i]) for i in ids[len(half) :]] + [stream.feed([], last=True)])
    assert tokenizer.decode(half) + rest == text
    assert rest.startswith(" ")


def test_special_ids_come_from_the_files_beside_it(tmp_path):
    sentencepiece_like(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    tokenizer = HfTokenizer(tmp_path / "model")
    assert tokenizer.eos_ids == (2, 9)
    assert tokenizer.end_of_text == 2
    assert token_ids(tokenizer) == {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}
    assert set(companions(tokenizer)) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_the_chat_template_is_what_transformers_renders(tmp_path):
    sentencepiece_like(tmp_path / "model")
    tokenizer, auto = HfTokenizer(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]
    for start in (False, True):
        expected = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=start)
        assert tokenizer.chat(messages, add_generation_prompt=start) == expected
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match="the chat template failed: no system here"):
        HfTokenizer(tmp_path / "model").chat(messages, True)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="the chat template failed"):  # the sandbox lets no program out
        HfTokenizer(tmp_path / "model").chat(messages, True)


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        HfTokenizer(tmp_path)
    with pytest.raises(UserError, match="has neither bpe.json nor tokenizer.json"):
        open_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")
    save(Tokenizer([]), tmp_path / "plain")
    with pytest.raises(UserError, match="no chat template"):
        HfTokenizer(tmp_path / "plain").chat([], True)
    import llm_common.errors

    monkeypatch.setattr(llm_common.errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizers is not installed; run: pip install 'tokenizers>="):
        HfTokenizer(tmp_path / "plain")
