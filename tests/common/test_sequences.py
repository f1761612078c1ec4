"""How documents and answers become ids: what stands before a text, what ends a document, a turn and a generated
text.
"""

import json

import numpy as np
import pytest

from llm_common.data.answers import ExampleReader
from llm_common.data.datasets import TokenDataset, check_data, write_tokens
from llm_common.data.sequences import DocumentEncoder, answer_encoder, resolve_token, split_ids
from llm_common.errors import UserError
from llm_common.text.hf_tokenizer import HfTokenizer, companions, load_tokenizer, stop_ids, token_ids
from llm_common.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def byte_level(folder, special, config, prefix=None, plain=(), files=None):
    """A byte-level tokenizer of single bytes, two merges and some added tokens, as a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "Ġf", "ou"])}
    t = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "f"), ("o", "u")]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(list(special))
    t.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if prefix is not None:
        t.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(prefix, t.token_to_id(prefix))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config.json": config, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def sentencepiece(folder, config, split="always"):
    """A SentencePiece-like tokenizer, as Llama 2's: ▁ for a space, one before every text, bytes as a fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzFISTNW[]/?", "ou", "▁F", "our", "▁Four", "Four", "NST", "INST"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("o", "u"), ("▁", "F"), ("ou", "r"), ("▁F", "our"), ("F", "our"), ("N", "S"), ("NS", "T"), ("I", "NST")]
    vocab["NS"] = len(vocab)
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names, **config})
    )
    return folder


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>")


def folder_of(family, path):
    if family == "qwen":
        return byte_level(
            path, QWEN, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        )
    if family == "llama3":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3}
        return byte_level(path, LLAMA, names, prefix="<|begin_of_text|>")
    if family == "r1":
        names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": R1}
        return byte_level(path, DEEPSEEK, names, prefix="<|bos|>", plain=("<think>", "</think>"))
    if family == "llama2":
        return sentencepiece(path, {"chat_template": LLAMA2})
    assert family == "legacy llama2"
    return sentencepiece(path, {"chat_template": LLAMA2, "tokenizer_class": "LlamaTokenizer", "legacy": True})


FAMILIES = ("qwen", "llama3", "r1", "llama2", "legacy llama2")


@pytest.mark.parametrize(
    ("family", "document", "turn"),
    [
        ("qwen", "<|endoftext|>", "<|im_end|>"),
        ("llama3", "<|end_of_text|>", "<|eot_id|>"),
        ("r1", "<|eos|>", "<|eos|>"),
        ("llama2", "</s>", "</s>"),
    ],
)
def test_three_things_end_each_at_its_own_token(family, document, turn, tmp_path):
    t = HfTokenizer(folder_of(family, tmp_path))
    assert (t.end_of_text, t.turn_end) == (t.token_id(document), t.token_id(turn))
    assert t.eos_ids == (t.token_id(turn),)
    prefix = {"qwen": [], "llama3": ["<|begin_of_text|>"], "r1": ["<|bos|>"], "llama2": ["<s>"]}[family]
    assert t.prefix_ids == [t.token_id(x) for x in prefix]
    encoder = DocumentEncoder(t)
    assert encoder("four") == [*t.prefix_ids, *t.encode("four"), t.end_of_text]
    assert encoder.prefix + t.encode("four") == transformers.AutoTokenizer.from_pretrained(tmp_path)("four").input_ids


def test_generation_stops_at_every_id_that_anything_names(tmp_path):
    files = {"generation_config.json": {"eos_token_id": [256, 300]}, "config.json": {"eos_token_id": 301}}
    folder = byte_level(tmp_path / "a", QWEN, {"eos_token": "<|im_end|>", "chat_template": CHATML}, files=files)
    t = HfTokenizer(folder)
    im_end = t.token_id("<|im_end|>")
    assert t.eos_ids == (256, 300, 301, im_end)
    assert stop_ids(t, [7]) == [256, 300, 301, im_end, 7]
    assert token_ids(t, [7])["eos_token_id"] == [256, 300, 301, im_end, 7]
    # and what is written with a model says so too
    (tmp_path / "b").mkdir()
    for name, content in companions(t, [7]).items():
        (tmp_path / "b" / name).write_bytes(content)
    assert set(HfTokenizer(tmp_path / "b").eos_ids) == {256, 300, im_end, 7, 301}
    ours = companions(Tokenizer([]), [7])
    assert json.loads(ours["generation_config.json"])["eos_token_id"] == [256, 7]


def test_a_tokenizer_without_an_end_lets_no_documents_run_together(tmp_path):
    t = HfTokenizer(byte_level(tmp_path, ("<a>", "<b>"), {}))
    with pytest.raises(
        UserError, match=r"names no token that ends a document.*`document_end` TOKEN \(it has <a>, <b>\)"
    ):
        DocumentEncoder(t)
    assert DocumentEncoder(t, "<b>")("x")[-1] == t.token_id("<b>")
    assert DocumentEncoder(t, str(t.token_id("<a>")))("x")[-1] == t.token_id("<a>")
    assert DocumentEncoder(t, "none")("x") == t.encode("x")
    with pytest.raises(
        UserError, match="`document_end` <c>: the tokenizer has no such token; its special tokens: <a>, <b>"
    ):
        DocumentEncoder(t, "<c>")
    with pytest.raises(UserError, match="no token that ends an answer"):
        answer_encoder(t)
    assert resolve_token(t, "none", "--turn-end") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_tokenized_whole_as_transformers_does_it(family, tmp_path):
    t, auto = HfTokenizer(folder_of(family, tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    reader = ExampleReader(t, chat=True)
    pairs = [("Say 4", "Four"), (" a ", " four\n"), ("é\u0301🙂", "ou four"), ("x", "\n\nfour"), ("?", "12 Four")]
    for prompt, answer in pairs:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = auto.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        head, tail = reader(prompt, answer)
        assert head + tail == whole
        assert answer.strip() in t.decode(tail)
        assert "assistant" not in t.decode(tail)
        assert prompt.strip() in t.decode(head)
        start = auto.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        if family != "r1":
            assert head == start[: len(head)]  # what generation begins with
        assert tail[-1] in (t.turn_end, *t.encode("\n"))


def test_the_answer_gets_no_space_of_its_own(tmp_path):
    """SentencePiece puts a space before every text: an answer tokenized by itself would have two."""
    t = HfTokenizer(folder_of("llama2", tmp_path))
    _, tail = ExampleReader(t, chat=True)("Say 4", "Four")
    assert tail[0] == t.token_id("▁Four")
    head, tail = answer_encoder(t)("Say 4 ", "Four")
    assert head + tail == [1, *t.encode("Say 4 Four"), 2]
    assert tail == [t.token_id("▁Four"), 2]  # a token of both texts is learned


def test_generation_prompts_that_no_conversation_has(tmp_path):
    """R1's distillations: the generation prompt opens a thought, the conversation drops it."""
    t = HfTokenizer(folder_of("r1", tmp_path))
    reader = ExampleReader(t, chat=True)
    head, tail = reader("why", "so")
    assert t.decode(head).endswith("<|Assistant|>")
    assert t.decode(tail) == "so<|eos|>"
    head, tail = reader("why", "<thin ice")  # begins as the generation prompt goes on
    assert t.decode(tail) == "<thin ice<|eos|>"
    assert reader.shortened == 0
    _, tail = reader("why", "long thoughts</think>so")
    assert (t.decode(tail), reader.shortened) == ("so<|eos|>", 1)


@pytest.mark.parametrize("family", ["qwen", "llama3"])
def test_special_tokens_in_a_text_are_text_unless_asked_for(family, tmp_path):
    t = HfTokenizer(folder_of(family, tmp_path))
    turn = t.turn_end
    text = next(x for x, i in t.special_tokens.items() if i == turn)
    assert t.encode(f"a{text}b", parse_special=False).count(turn) == 0
    assert DocumentEncoder(t)(f"a{text}b").count(turn) == 0
    assert DocumentEncoder(t, parse_special=True)(f"a{text}b").count(turn) == 1
    head, tail = ExampleReader(t, chat=True)(f"say {text} twice", f"no {text}{text}!")
    assert (head.count(turn), tail.count(turn)) == (1, 1)  # the template's own
    assert t.decode(head + tail) == t.chat(
        [{"role": "user", "content": f"say {text} twice"}, {"role": "assistant", "content": f"no {text}{text}!"}], False
    )
    head, tail = ExampleReader(t, chat=True, parse_special=True)(f"say {text} twice", f"no {text}{text}!")
    assert (head.count(turn), tail.count(turn)) == (2, 3)


def test_a_tokenizer_that_cannot_take_a_special_token_as_text_says_so(tmp_path):
    t = HfTokenizer(sentencepiece(tmp_path, {"chat_template": LLAMA2, "tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match="'</s>' stands in a text and is a special token"):
        ExampleReader(t, chat=True)("a</s>b", "c")
    assert ExampleReader(t, chat=True, parse_special=True)("a</s>b", "c")[0].count(2) == 1


def test_a_document_with_its_own_end_inside_is_counted(tmp_path):
    """What ends a document within one would hide its beginning under a document mask."""
    info = write_tokens(tmp_path / "a.npy", ["ab", "cd"], Tokenizer([]))
    assert info["document_ends_inside"] == 0
    encoder = DocumentEncoder(Tokenizer([]), parse_special=True)
    info = write_tokens(tmp_path / "b.npy", ["a<|endoftext|>b", "c"], encoder)
    assert (info["document_ends_inside"], info["document_end"]) == (1, 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_is_at_characters(family, tmp_path):
    t = HfTokenizer(folder_of(family, tmp_path))
    text = "ou four é🙂 12\n\n Four"
    whole = t.encode(text)
    for at in range(len(text) + 1):
        head, tail = split_ids(t, text, at)
        assert head + tail == whole
        assert len(t.decode(head).strip("\ufffd ")) <= at
    ours = Tokenizer([(b" ", b"f"), (b"o", b"u")])
    for at in range(len(text) + 1):
        head, tail = split_ids(ours, text, at)
        assert head + tail == ours.encode(text)
        assert text.startswith(ours.decode_bytes(head).decode())
        assert len(ours.decode_bytes(head).decode()) >= at - 1


def test_half_a_surrogate_pair_anywhere(tmp_path):
    t = HfTokenizer(folder_of("qwen", tmp_path))
    for text in ("\ud800", "a\udfffb", "\ud83d\ude42"):
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert t.encode(text) == t.encode(clean) == t.encode_prompt(text)
        head, tail = ExampleReader(t, chat=True)(text, text)
        assert t.decode(head).count(clean) == t.decode(tail).count(clean) == 1
        assert DocumentEncoder(t)(text)[:-1] == t.encode(clean)
    head, tail = answer_encoder(Tokenizer([]))("\ud83d", "\ude42")  # two halves of two texts are no pair
    assert Tokenizer([]).decode(head + tail) == "\ufffd\ufffd<|endoftext|>"


def test_a_folder_is_the_same_tokenizer_with_and_without_the_library(tmp_path, monkeypatch):
    import importlib.util

    import llm_common.text.hf_tokenizer

    folder = byte_level(
        tmp_path, (*QWEN, "<đ>"), {"eos_token": "<|im_end|>", "chat_template": CHATML}, plain=("<tool>", "đđ", "é!")
    )
    with_library = load_tokenizer(folder)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        llm_common.text.hf_tokenizer.importlib.util,
        "find_spec",
        lambda name: None if name == "tokenizers" else find(name),
    )
    without = load_tokenizer(folder)
    assert (type(with_library), type(without)) == (HfTokenizer, Tokenizer)
    assert with_library.fingerprint() == without.fingerprint()
    np.testing.assert_array_equal(with_library.byte_lengths(), without.byte_lengths())
    lengths = without.byte_lengths()
    assert [lengths[without.token_id(x)] for x in ("<tool>", "đđ", "é!", "<đ>", "<|im_end|>")] == [6, 4, 3, 0, 0]
    for text in ("<đ> four <tool>đđ é!", "\x11<đ>\x11<|im_end|>", "é!é!ou"):
        for parse in (True, False):
            ids = with_library.encode(text, parse)
            assert without.encode(text, parse) == ids
            assert with_library.decode(ids) == without.decode(ids) == text
    messages = [{"role": "user", "content": "a"}]
    assert with_library.chat(messages, True) == without.chat(messages, True)
    assert companions(with_library) == companions(without)
    reader = [ExampleReader(x, chat=True)("a<|im_end|>", "four") for x in (with_library, without)]
    assert reader[0] == reader[1]


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
def test_qwen_saved_as_vocab_and_merges(where, tmp_path):
    """The pattern, the normalization and the added tokens are not in these two files: the class and others say them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "Ġf", "ou"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ f\no u\n", encoding="utf-8")
    added = {text: len(vocab) + i for i, text in enumerate(QWEN)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps(added))
        config["additional_special_tokens"] = list(QWEN)
    else:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        config[where] = {str(i): {"content": text, "special": True, **flags} for text, i in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = load_tokenizer(tmp_path)
    assert (t.pattern, t.normalization, t.special_tokens["<|im_start|>"]) == ("qwen2", "NFC", added["<|im_start|>"])
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<|im_start|>user\nfour 1234<|im_end|>", "ou e\u0301\n\n  four"):
        assert t.encode(text) == auto(text).input_ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    with pytest.raises(UserError, match="belongs to a RobertaTokenizer, which cuts words in a way"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_lacks_bytes_reads_as_the_library_reads_it(tmp_path):
    """SmolLM2's lacks 21 single bytes; text with them loses them, as with the library."""
    from llm_common.text.tokenizer_json import read_hf_folder

    folder = byte_level(tmp_path, QWEN, {"eos_token": "<|im_end|>"})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    gone = ["Ă", "ĥ", "x"]
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k not in gone}
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}  # as there
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = read_hf_folder(folder), HfTokenizer(folder)
    for text in ("axb four", "\x02x\x83", "x", "fxour oxu"):
        assert ours.encode(text) == theirs.encode(text)
    head, tail = split_ids(ours, "axb four", 2)
    assert (ours.decode(head), ours.decode(tail)) == ("a", "b four")


def test_token_files_say_which_rule_made_them(tmp_path):
    path = tmp_path / "t.npy"
    write_tokens(path, ["abc", "d"], Tokenizer([]))
    assert check_data(path, Tokenizer([]))["rule"] == 2
    description = path.with_name("t.npy.json")
    good = json.loads(description.read_text())
    for change, words in (
        ({"rule": 1}, "made by rule 1 of how documents become tokens; this version has rule 2"),
        ({"tokens": 3}, "damaged \\(its checksum"),
        ({"file": "u.npy"}, "damaged"),
    ):
        description.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=words):
            check_data(path)
    description.unlink()
    with pytest.raises(UserError, match=r"no t.npy.json beside it.*one-model prepare-data"):
        check_data(path)
    description.write_text(json.dumps(good))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="t.npy: damaged"):
        check_data(path)
    assert TokenDataset(path, 2, 1, 0).n_windows == 2  # a library's user opens what they like


def test_a_kill_between_a_file_and_its_description_leaves_a_pair(tmp_path, monkeypatch):
    """At any moment the data and what is said of it belong together, old or new."""
    from pathlib import Path

    path = tmp_path / "t.npy"
    write_tokens(path, ["abc"], Tokenizer([]))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, ["abcdef", "g"], Tokenizer([]))
    monkeypatch.setattr(Path, "replace", replace)
    assert check_data(path)["tokens"] == 9  # the new file, with the description that waited
    import llm_common.data.datasets

    monkeypatch.setattr(llm_common.data.datasets, "write_whole", killed_at(path, llm_common.data.datasets.write_whole))
    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, ["h"], Tokenizer([]))
    assert check_data(path)["tokens"] == 9


def killed_at(path, write):
    def until(target, content):
        if target == path:
            raise KeyboardInterrupt
        write(target, content)

    return until


FLAGS = dict.fromkeys(("normalized", "single_word"), False) | {"lstrip": True, "rstrip": True, "__type": "AddedToken"}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"additional_special_tokens": ["<x>", "<new>"]}, {}),
        ({"extra_special_tokens": ["<x>"]}, {}),
        ({"extra_special_tokens": {"image": "<x>"}}, {}),
        ({"image_token": "<x>"}, {}),
        ({"eos_token": {"content": "<x>", **FLAGS}}, {}),
        ({"pad_token": "<x>"}, {}),
        ({"split_special_tokens": True}, {}),
        ({}, {"special_tokens_map.json": {"eos_token": "<x>"}}),
        ({"added_tokens_decoder": {}}, {"special_tokens_map.json": {"pad_token": "<x>"}}),
    ],
)
def test_tokens_that_only_the_other_files_name(config, files, tmp_path):
    """transformers adds them; read in Python, where their ids would be guessed, they are refused."""
    from llm_common.text.tokenizer_json import read_hf_folder

    byte_level(tmp_path, QWEN, {"eos_token": "<|im_end|>", **config}, files=files)
    t, auto = HfTokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <x> b", "<x><|im_end|> <new>four"):
        assert t.encode(text) == auto(text, add_special_tokens=False).input_ids
    if "<x>" in (*t.folder.named.values(), *t.folder.more_special) or "split_special_tokens" in config:
        with pytest.raises(UserError, match="install the tokenizers package"):
            read_hf_folder(tmp_path)
    else:
        assert read_hf_folder(tmp_path).encode("a <x> b") == t.encode("a <x> b")


def test_a_token_that_is_no_text_is_not_another_one(tmp_path):
    t = HfTokenizer(folder_of("qwen", tmp_path))
    for text in ("\udcff", "9" * 5000, "?\ud800"):
        for tokenizer in (t, Tokenizer([])):
            with pytest.raises(UserError, match="the tokenizer has no such token"):
                resolve_token(tokenizer, text, "--turn-end")


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path):
    np.save(tmp_path / "mine.npy", np.arange(5))
    with pytest.raises(UserError, match="is there already, and was not made by this program"):
        write_tokens(tmp_path / "mine.npy", ["a"], Tokenizer([]))
    assert np.load(tmp_path / "mine.npy").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "added", [{"<a>": 299, "<b>": 260}, {"<b>": 258, "<a>": 259, "<c>": 4000}, {"<a>": 257, "<b>": 258}]
)
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("whole", [True, False])
def test_added_tokens_whose_ids_leave_a_gap(whole, name, added, tmp_path, capsys):
    """transformers gives the next id, whatever is written; so do both readers here, and they say it."""
    from llm_common.text.tokenizer_json import read_hf_folder

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if whole:
        library.save(str(tmp_path / "tokenizer.json"))
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    config = {"tokenizer_class": name, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    capsys.readouterr()
    for read in (load_tokenizer, read_hf_folder):
        tokenizer = read(tmp_path)
        assert tokenizer is not None
        for text in ("<a>", "x<b><c> y", "<|endoftext|>"):
            assert tokenizer.encode(text) == auto.encode(text)
        said = capsys.readouterr().err
        assert ("as in transformers, and not the" in said) == (added != {"<a>": 257, "<b>": 258})
