"""Tokenizers of other people's kinds, read without their library: the same ids as the library gives, or refused by
name.
"""

import json
import unicodedata

import pytest

from llm_common.errors import UserError
from llm_common.text.bpe_reference import WORDS
from llm_common.text.corpus import python_documentation
from llm_common.text.hf_tokenizer import HfTokenizer, open_tokenizer
from llm_common.text.tokenizer import Tokenizer
from llm_common.text.tokenizer_json import SPELLINGS, read_hf_folder, to_hf_files

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

EVERY = "".join(chr(c) for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000)
CORPUS = [text for _, text in zip(range(200), python_documentation(), strict=False)]
TEXTS = [
    "I'LL we've 1 22 333 4444!\r\n\n  \t x  ",
    "日本語 🙂👩‍👩‍👧 Ελλάδα e\u0301 가 ½² 5's '5",
    "<|im_end|>a<|im_end|><|end_of_text|>",
    "x" * 400 + "  7",
    "",
    *CORPUS[:40],
    EVERY,
    "a".join(EVERY[:0x3000]),
]


def library_tokenizer(style):
    spelling = {name: text for text, name in SPELLINGS.items()}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style in ("gpt2", "smollm2"))
    split = lambda: pre_tokenizers.Split(Regex(spelling[style.removesuffix("+nfc")]), "isolated")
    steps = {"gpt2": [], "smollm2": [pre_tokenizers.Digits(individual_digits=True)]}
    before = steps[style] if style in steps else [split()]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if style.endswith("+nfc"):
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_end|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if style == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


STYLES = ("gpt2", "llama3", "qwen2", "qwen2+nfc", "smollm2")


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_library(style, tmp_path):
    theirs = library_tokenizer(style)
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    ours = read_hf_folder(tmp_path)
    through_library = HfTokenizer(tmp_path)
    assert ours.pattern == style.removesuffix("+nfc")
    for role in ("end_of_text", "turn_end", "eos_ids", "prefix_ids", "context_ids", "vocab_size", "plain_vocab_size"):
        assert getattr(ours, role) == getattr(through_library, role), role
    # a chat model's eos_token ends a turn; a document ends as it did before
    assert (ours.end_of_text, ours.turn_end) == (theirs.token_to_id("<|endoftext|>"), theirs.token_to_id("<|im_end|>"))
    assert ours.fingerprint() == through_library.fingerprint()
    fast = Tokenizer.load(saved(ours, tmp_path / "bpe.json"))
    fast._encoded = 1 << 30
    for text in TEXTS:
        if style.endswith(
            "+nfc"
        ):  # of the tables for it, the library's and Python's, the one knows what the other does not
            text = "".join(c for c in text if unicodedata.ucd_3_2_0.category(c) != "Cn")
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert fast.encode(text) == ids
        if len(text) > 10_000:
            continue
        assert list(ours.encode_iterable((text[i : i + 50] for i in range(0, len(text), 50)), 200)) == ids
        assert ours.encode_prompt(text) == through_library.encode_prompt(text)
        assert ours.decode(ids) == through_library.decode(ids)
    # and written again
    for name, content in to_hf_files(ours).items():
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    again = read_hf_folder(tmp_path / "again")
    assert again.to_json() == ours.to_json()
    for text in TEXTS[:-2]:
        assert HfTokenizer(tmp_path / "again").encode_prompt(text) == ours.encode_prompt(text)


def saved(tokenizer, path):
    tokenizer.save(path)
    return path


def test_gpt2_files(tmp_path):
    theirs = library_tokenizer("gpt2")
    theirs.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert vocab["<|im_end|>"] == 1
    assert merges.startswith("#version")
    ours = open_tokenizer(tmp_path)
    assert isinstance(ours, Tokenizer)
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_end|>": 1, "<|end_of_text|>": 2}
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids


def changed(**changes):
    content = json.loads(library_tokenizer("gpt2").to_str())
    for key, value in changes.items():
        if key == "model":
            content["model"] |= value
        else:
            content[key] = value
    return content


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS + "|x"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "a WordPiece model, not byte-level BPE"),
        ({"model": {"byte_fallback": True}}, "BPE with byte_fallback"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "BPE with end_of_word_suffix"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre-tokenizer Metaspace is not byte-level"),
        ({"pre_tokenizer": None}, "pre-tokenizer none"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}}, "the pattern .* is not known"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}},
            "Punctuation, ByteLevel is not known",
        ),
        ({"post_processor": {"type": "BertProcessing"}}, "post-processor BertProcessing"),
        ({"model": {"merges": ["▁ a"]}}, "merge 0 .* is not byte-level"),
        ({"added_tokens": [{"id": 0, "content": "<m>", "lstrip": True}]}, "'<m>' with lstrip"),
    ],
)
def test_what_is_not_byte_level_bpe_is_refused_by_name(changes, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(**changes)), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_hf_folder(tmp_path)
