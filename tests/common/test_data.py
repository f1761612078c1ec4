"""The token dataset: a pure function of the step that uses every window once an epoch."""

import concurrent.futures
import sys
import time

import numpy as np
import pytest

from llm_common.data.datasets import Order, Prefetch, TokenDataset, check_data, unigram_entropy, write_tokens
from llm_common.errors import UserError
from llm_common.run.log import RunLog, read_log
from llm_common.text.corpus import documents, python_documentation
from llm_common.text.tokenizer import Tokenizer


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(1001, dtype=np.uint16))
    return tmp_path / "tokens.npy"


def test_targets_are_the_inputs_one_to_the_right(path):
    inputs, targets = TokenDataset(path, 10, 4, 0).batch(3)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)


def test_an_epoch_uses_every_window_once_and_the_next_one_another_order(path):
    dataset = TokenDataset(path, 10, 8, 0)  # 100 windows: 12.5 batches
    starts = np.concatenate([dataset.batch(step)[0][:, 0] for step in range(25)])
    first, second = starts[:100], starts[100:]
    assert sorted(first) == sorted(second) == list(range(0, 1000, 10))
    assert list(first) != list(second)
    assert list(first) != sorted(first)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_an_order_is_a_permutation_of_any_number(n):
    order = Order(n, 5)
    epochs = [[order(epoch * n + i) for i in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_an_order_of_more_than_memory_holds():
    n = 10**12
    order = Order(n, 0)
    found = [order(number) for number in [*range(1000), *range(n - 1000, n), *range(7 * n, 7 * n + 1000)]]
    assert len(set(found[:2000])) == 2000
    assert all(0 <= x < n for x in found)
    assert abs(np.mean(found) / n - 0.5) < 0.03  # five standard errors
    assert Order(n, 1)(0) != order(0)


def test_every_window_comes_anywhere_equally_often():
    counts, epochs = np.zeros((6, 6)), 3000
    order = Order(6, 1)
    for number in range(6 * epochs):
        counts[number % 6, order(number)] += 1
    chi_squared = ((counts - epochs / 6) ** 2 / (epochs / 6)).sum()
    assert chi_squared < 80  # 25 degrees of freedom: by chance in less than one of a million


def test_batches_do_not_depend_on_what_was_asked_before(path):
    a, b = TokenDataset(path, 10, 8, 3), TokenDataset(path, 10, 8, 3)
    for step in (40, 0, 12, 13, 40):
        np.testing.assert_array_equal(a.batch(step)[0], b.batch(step)[0])
    assert not np.array_equal(a.batch(0)[0], TokenDataset(path, 10, 8, 4).batch(0)[0])


def test_hosts_share_one_global_batch(path):
    dataset = TokenDataset(path, 10, 8, 0)
    for hosts in (1, 2, 4, 8):
        for step in (0, 12):  # in the middle, and over the border of two epochs
            parts = [dataset.batch(step, host, hosts)[0] for host in range(hosts)]
            np.testing.assert_array_equal(np.concatenate(parts), dataset.batch(step)[0])
    with pytest.raises(UserError, match="batch_size = 8 is not divisible by 3"):
        dataset.batch(0, 0, 3)


def test_the_fingerprint_sees_every_token_and_setting(path, tmp_path):
    tokens = np.load(path)
    tokens[500] += 1
    np.save(tmp_path / "other.npy", tokens)
    prints = [
        TokenDataset(path, 10, 4, 0),
        TokenDataset(tmp_path / "other.npy", 10, 4, 0),
        TokenDataset(path, 10, 4, 1),
    ]
    assert len({str(dataset.fingerprint()) for dataset in prints}) == 3


def test_a_token_file_of_another_tokenizer_is_refused(tmp_path):
    write_tokens(tmp_path / "t.npy", ["abc"], Tokenizer([]))
    check_data(tmp_path / "t.npy", Tokenizer([]))
    with pytest.raises(UserError, match="made by another tokenizer"):
        check_data(tmp_path / "t.npy", Tokenizer([(b"a", b"b")]))
    with pytest.raises(UserError, match="must end in .npy"):
        write_tokens(tmp_path / "t.bin", ["abc"], Tokenizer([]))


@pytest.mark.parametrize(("step", "host", "n_hosts"), [(-1, 0, 1), (0, 2, 2), (0, -1, 2)])
def test_a_step_or_host_out_of_range_is_refused(step, host, n_hosts, path):
    with pytest.raises(UserError, match="must lie in range"):
        TokenDataset(path, 10, 4, 0).batch(step, host, n_hosts)


@pytest.mark.parametrize(("seq_len", "batch_size", "seed"), [(0, 4, 0), (10, 0, 0), (10, 4, -1)])
def test_bad_dataset_settings_are_refused(seq_len, batch_size, seed, path):
    with pytest.raises(UserError, match="must be at least"):
        TokenDataset(path, seq_len, batch_size, seed)


def test_write_tokens(tmp_path):
    tokenizer = Tokenizer([])
    info = write_tokens(tmp_path / "deep" / "t.npy", ["ab", "c"], tokenizer)
    tokens = np.load(tmp_path / "deep" / "t.npy")
    assert tokens.tolist() == [97, 98, 256, 99, 256]
    assert tokens.dtype == np.uint16
    assert (info["tokens"], info["documents"], info["bytes"]) == (5, 2, 3)
    assert unigram_entropy(np.array([0, 1, 1, 0])) == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such token file.*one-model prepare-data"),
        (b"not numpy", "not a token file"),
        ({"a": np.zeros(3)}, "an archive of arrays"),
        (np.zeros((2, 3), np.int32), "flat array of integers"),
        (np.zeros(9, np.float32), "flat array of integers"),
        (np.zeros(10, np.int32), "10 tokens are fewer than one window of seq_len \\+ 1 = 11"),
        (np.full(20, 7, np.int32), "token id 7 is outside the model's vocabulary \\[0, 5\\)"),
        (np.full(20, -1, np.int32), "token id -1 is outside"),
    ],
)
def test_a_bad_token_file_is_refused(content, words, tmp_path):
    path = tmp_path / "t.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path.with_suffix(""), **content)
        path.with_suffix(".npz").rename(path)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=words):
        TokenDataset(path, 10, 2, 0, vocab_size=5)


def test_the_default_corpus_is_english_prose_and_always_the_same():
    texts = list(python_documentation())
    assert len(texts) > 1000
    assert sum(map(len, texts)) > 1_000_000
    assert texts == list(python_documentation())
    assert any("statement" in text for text in texts[:50])


def test_a_corpus_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert list(documents(tmp_path)) == ["one", "two", "three"]
    assert list(documents(tmp_path / "a.txt")) == ["one", "two"]


def test_an_unusable_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(documents(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no text found"):
        list(documents(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        list(documents(tmp_path))
    with pytest.raises(UserError, match="corpus is empty"):
        write_tokens(tmp_path / "t.npy", [], Tokenizer([]))


def test_the_log_starts_with_the_environment(tmp_path):
    with RunLog(tmp_path / "log.jsonl", framework="jax") as log:
        assert not log.path.exists()  # a run that is refused leaves no trace
        log.write({"step": 1, "loss": 2.5})
        log.write({"step": 2, "loss": float("nan")})
    header, row, last = read_log(tmp_path / "log.jsonl")
    assert header["event"] == "start"
    assert header["framework"] == "jax"
    assert header["versions"]["numpy"] == np.__version__
    assert row == {"step": 1, "loss": 2.5}
    assert last == {"step": 2, "loss": None}  # JSON has no NaN


class Slow:
    """A dataset that counts what is read of it, and fails at a step."""

    def __init__(self, bad_step: int = -1) -> None:
        self.read, self.bad_step = [], bad_step

    def batch(self, step, host=0, n_hosts=1):
        self.read.append((step, host, n_hosts))
        if step == self.bad_step:
            raise UserError(f"step {step} cannot be read")
        return np.full((2, 3), step), np.full((2, 3), 10 * step + host)

    def fingerprint(self):
        return {"a": 1}


def test_the_next_batch_is_read_ahead_and_only_once():
    data = Slow()
    ahead = Prefetch(data)
    for step in (0, 1, 2, 7, 8):  # 7: somewhere else
        for host in (0, 1):
            assert ahead.batch(step, host, 2)[1][0, 0] == 10 * step + host
    deadline = time.monotonic() + 5
    while len(data.read) < 14 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(data.read) == sorted((step, host, 2) for step in (0, 1, 2, 3, 7, 8, 9) for host in (0, 1))
    assert ahead.fingerprint() == {"a": 1}


def test_what_fails_ahead_is_raised_when_it_is_asked_for():
    ahead = Prefetch(Slow(bad_step=1))
    ahead.batch(0)
    with pytest.raises(UserError, match="step 1 cannot be read"):
        ahead.batch(1)


def test_windows_for_other_loaders(tmp_path):
    torch = pytest.importorskip("torch")
    np.save(tmp_path / "tokens.npy", np.arange(100, dtype=np.uint16))
    windows = TokenDataset(tmp_path / "tokens.npy", 9, 2, 0).windows()
    assert len(windows) == 11
    with pytest.raises(IndexError):
        windows[11]
    loader = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=False)
    batches = list(loader)
    assert batches[0]["inputs"].shape == (4, 9)
    np.testing.assert_array_equal(torch.cat([b["inputs"] for b in batches]).flatten(), np.arange(99))
    np.testing.assert_array_equal(torch.cat([b["targets"] for b in batches]).flatten(), np.arange(1, 100))


def test_windows_as_a_source_of_grain(tmp_path):
    grain = pytest.importorskip("grain")
    np.save(tmp_path / "tokens.npy", np.arange(100, dtype=np.uint16))
    windows = TokenDataset(tmp_path / "tokens.npy", 9, 2, 0).windows()
    dataset = grain.MapDataset.source(windows).shuffle(seed=3).batch(11)
    found = np.sort(np.asarray(dataset[0]["inputs"]), axis=0).flatten()
    np.testing.assert_array_equal(found, np.arange(99))


def test_threads_that_read_different_epochs_see_their_own_windows():
    """What a dataset keeps of the last epoch is for speed alone: it is read and replaced as one."""
    order = Order(5, 3)
    expected = [Order(5, 3)(number) for number in range(40)]
    wrong: list[int] = []

    def read(first: int) -> None:
        for _ in range(300):
            wrong.extend(number for number in range(first, first + 5) if order(number) != expected[number])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(read, (0, 5, 20, 35)))
    finally:
        sys.setswitchinterval(before)
    assert not wrong
