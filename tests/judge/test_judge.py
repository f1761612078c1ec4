"""Pairs of strangers' models: a correct one is the same at the first try, a broken one is different, at its place."""

import json

import numpy as np
import pytest
import torch

from llm_common.errors import UserError
from parity.judge import assert_same, judge
from tests.judge.pairs import KINDS, Made

SLOW = {"cnn_with_batch_norm", "vision_transformer", "scanned_layers", "u_net", "flattened_convolution", "lstm"}
marked = lambda name: pytest.mark.slow if name in SLOW else ()
BUGS = [(name, bug) for name, kind in KINDS.items() for bug in kind.bugs]


def verdict_of(made: Made):
    return judge(made.reference, made.candidate, made.inputs, **made.more)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marked(name)) for name in KINDS])
def test_a_correct_port_is_the_same(name):
    verdict = verdict_of(KINDS[name].make(""))
    assert verdict.word == "same", verdict.text()


@pytest.mark.parametrize(("name", "bug"), [pytest.param(*x, marks=marked(x[0])) for x in BUGS])
def test_a_bug_is_seen(name, bug):
    kind = KINDS[name]
    verdict = verdict_of(kind.make(bug))
    assert verdict.word == "different", verdict.text()
    assert kind.places.get(bug, "") in str(verdict.place), verdict.text()


# --- never wrong in silence


class Twice(torch.nn.Module):
    """y = f(W x), for the small cases below."""

    def __init__(self, f=lambda x: x, size=6):
        super().__init__()
        self.lin, self.f = torch.nn.Linear(size, size), f

    def forward(self, x):
        return self.f(self.lin(x))


X = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)


def small(f=lambda x: x, g=lambda x: x, x=X, **more):
    return judge(Twice(f), Twice(g), [x], **more)


def test_a_candidate_cannot_buy_its_own_tolerance():
    """A chaotic map that no gradient sees, in the candidate alone: its noise is not the reference's."""

    def chaotic(x):
        y = torch.sigmoid(x.detach())
        for _ in range(80):
            y = 3.99 * y * (1 - y)
        return x + y - y.mean()

    assert small(torch.nn.Identity(), chaotic).word == "different"
    both = small(chaotic, chaotic)  # and of a reference that is chaotic nothing is claimed
    assert both.word != "different"
    assert any("rounding alone changes it" in x for x in both.not_covered)


@pytest.mark.parametrize(
    "cheat",
    [
        lambda x: torch.zeros_like(x),
        lambda x: x + 1e-5 * torch.randn_like(x),
        lambda x: x * (1 + 1e-9),
        lambda x: x if x.abs().max() < 8 else x * 0,
        lambda x: x if x.shape[0] == 4 and x.dtype == torch.float32 else x * 1.001,
        lambda x: (x - x.detach()) + x.detach() * 1.0001,
    ],
    ids=["zeros", "noise", "a billionth", "by magnitude", "by dtype", "the value alone"],
)
def test_cheats_are_different(cheat):
    assert small(lambda x: x, cheat).word == "different"


def test_a_table_of_the_given_inputs_is_no_program():
    reference = Twice()

    class Table(Twice):
        def forward(self, x):
            known = x.shape == X.shape and torch.allclose(x.float(), torch.tensor(X))
            return super().forward(x) if known else 0 * super().forward(x)

    verdict = judge(reference, Table(), [X])
    assert {figure.draw for figure in verdict.findings} == {"inputs drawn, scale 1", "inputs drawn, scale 0.01"} | {
        "inputs drawn, scale 30"
    }


def test_what_is_not_a_number_on_both_sides_is_not_judged():
    verdict = small(lambda x: x * float("nan"), lambda x: x * float("nan"))
    assert verdict.word == "not_judged"
    assert verdict.exit_code == 3
    assert any("are not finite in the reference" in x for x in verdict.not_covered)


def test_parameters_that_nothing_reaches_are_not_covered():
    class Unused(Twice):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Parameter(torch.ones(3))

    verdict = judge(Unused(), Unused(), [X])
    assert verdict.word == "same"
    assert any("parameter other: no gradient reaches it" in x for x in verdict.not_covered)
    frozen = Twice()
    frozen.lin.bias.requires_grad_(False)
    assert any("frozen" in x for x in judge(Twice(), frozen, [X]).not_covered)


def test_a_parameter_without_a_partner_is_different():
    class More(Twice):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.ones(7))

    for pair in ((More(), Twice()), (Twice(), More())):
        verdict = judge(*pair, [X])
        assert verdict.word == "different"
        assert verdict.findings[0].check == "parameters"
        assert verdict.findings[0].tensor == "extra"


def test_a_side_that_computes_in_float32_is_recognised():
    verdict = small(lambda x: torch.tanh(x), lambda x: torch.tanh(x.float()).to(x.dtype))
    assert verdict.word == "same", verdict.text()
    assert any("the candidate computes in float32" in x for x in verdict.not_covered)
    assert small(torch.tanh, lambda x: torch.tanh(x.float() * 1.00002).to(x.dtype)).word == "different"


def test_constants_match_nothing_by_their_values():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            for p in (self.first.bias, self.second.bias):
                torch.nn.init.zeros_(p)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    verdict = judge(Two(), Two(), [X])
    assert verdict.word == "same"
    assert verdict.matching.how["first.bias"] == "first.bias (the same name)"


def test_what_is_known_is_never_changed_to_make_outputs_agree():
    """A candidate that turns its weights, or swaps them, is broken: the judge must not turn them back."""
    turned = lambda m, x: x @ m.lin.weight + m.lin.bias

    class Turned(Twice):
        def forward(self, x):
            return turned(self, x)

    reference, candidate = Twice(), Turned()
    candidate.load_state_dict(reference.state_dict())
    assert judge(reference, candidate, [X], weights="given").word == "different"
    assert judge(reference, candidate, [X], names={"lin.weight": "lin.weight"}).word == "different"
    assert judge(Twice(), Turned(), [X]).word == "different"


def test_one_huge_number_hides_nothing():
    last = torch.arange(6) == 5
    hidden = lambda x, plus: (x + plus).masked_fill(last, torch.finfo(x.dtype).min)
    assert small(lambda x: hidden(x, 0.0), lambda x: hidden(x, 0.0)).word == "same"
    assert small(lambda x: hidden(x, 0.0), lambda x: hidden(x, 0.5)).word == "different"
    masked = lambda x: x.masked_fill(last, -torch.inf)
    assert small(masked, masked).word == "same"
    assert small(masked, lambda x: masked(x * (1.0 if x.abs().max() < 4 else 2.0))).word == "different"


def test_imaginary_parts_are_compared():
    class Cis(Twice):
        cis: torch.Tensor

        def __init__(self, sign):
            super().__init__()
            self.register_buffer("cis", torch.polar(torch.ones(3), sign * torch.arange(3.0)))

        def forward(self, x):
            z = torch.view_as_complex(self.lin(x).unflatten(-1, (3, 2)).contiguous()) * self.cis
            return torch.view_as_real(z).flatten(-2)

    assert judge(Cis(1), Cis(1), [X]).word == "same"


def test_a_buffer_that_nothing_uses_buys_no_tolerance():
    class Junk(Twice):
        def __init__(self):
            super().__init__(lambda x: x * (1 + 5e-6))
            self.register_buffer("junk", torch.rand(6))

    assert judge(Twice(), Junk(), [X]).word == "different"


def test_two_runs_of_a_candidate_must_be_the_same():
    verdict = small(lambda x: x, lambda x: x + 1e-6 * torch.rand_like(x))
    assert any("two runs of it" in x.hint for x in verdict.findings)


def test_inputs_that_never_vary_are_not_covered():
    verdict = judge(Twice(), Twice(), [X, np.ones(4, bool)][:1])
    assert not any("only ever as it was given" in x for x in verdict.not_covered)

    class Masked(Twice):
        def forward(self, x, mask):
            return super().forward(x)

    verdict = judge(Masked(), Masked(), [X, np.ones(4, bool)])
    assert any("input 1: only ever as it was given" in x for x in verdict.not_covered)


def test_weights_can_go_the_other_way():
    reference, candidate = Twice(), Twice()
    assert judge(reference, candidate, [X], weights="candidate").word == "same"
    given = judge(reference, candidate, [X], weights="given")
    assert given.word == "different"
    assert given.findings[0].hint == "the weights that were given"


def test_positions_that_do_not_matter_are_left_out():
    keep = np.array([True, True, False, True])
    broken = lambda x: x + 5 * torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=x.dtype)[:, None]
    assert small(lambda x: x, broken).word == "different"
    assert small(lambda x: x, broken, mask=keep).word == "same"


def test_axes_of_one_are_no_difference():
    verdict = small(lambda x: x.sum(-1, keepdim=True), lambda x: x.sum(-1))
    assert verdict.word == "same", verdict.text()


def test_who_cannot_run_is_told_with_the_line():
    def raises(x):
        raise ValueError("no such thing")

    verdict = small(lambda x: x, raises)
    assert verdict.word == "different"
    assert verdict.findings[0].side == "candidate"
    assert "ValueError: no such thing in test_judge.py" in verdict.findings[0].hint
    with pytest.raises(UserError, match="the reference cannot run"):
        small(raises)


def test_an_assertion_has_the_verdict_and_no_tolerance():
    with pytest.raises(AssertionError, match="candidate: different"):
        assert_same(reference=Twice(), candidate=Twice(torch.tanh), inputs=[X])
    with pytest.raises(UserError, match="there is no tolerance to choose"):
        assert_same(Twice(), Twice(), [X], rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mode": "test"}, "must be 'eval' or 'train'"),
        ({"weights": "mine"}, "weights = 'mine'"),
        ({"layout": "NHWC"}, "layout = 'NHWC'"),
        ({"dtypes": ["int8"]}, "dtype 'int8' is not known"),
        ({"names": {"nope": "lin.bias"}}, "the candidate has no tensor 'nope'"),
        ({"names": {"lin.bias": "nope"}}, "the reference has no leaf 'nope'"),
        ({"names": {"lin.bias": "lin.weight"}}, "cannot be made of"),
    ],
)
def test_wrong_arguments_are_one_line(more, words):
    with pytest.raises(UserError, match=words):
        small(**more)


def test_the_json_says_all_of_it():
    content = small(lambda x: x, torch.tanh).to_json()
    assert content["schema"] == 1
    assert content["verdict"] == "different"
    assert content["findings"][0]["place_kind"] == "module"
    assert {"candidate", "map", "how", "guess", "state"} == set(content["matching"][0])
    assert content["versions"]["torch"]


MODELS = """
import torch
def reference():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 6)
def port(): return torch.nn.Linear(6, 6)
def wrong(): return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
def empty(): return 1 / 0
"""


def test_the_command_has_four_exit_codes(tmp_path, capsys):
    from parity.commands import cli

    (tmp_path / "m.py").write_text(MODELS)
    np.savez(tmp_path / "x.npz", X)
    np.savez(tmp_path / "nan.npz", X * np.nan)
    call = lambda name, inputs="x.npz", *flags: cli.main(
        ["judge", f"{tmp_path}/m.py:reference", f"{tmp_path}/m.py:{name}", "--inputs", f"{tmp_path}/{inputs}", *flags]
    )
    assert call("port", "x.npz", "--out", str(tmp_path / "v.json")) == 0
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "same"
    capsys.readouterr()
    assert call("wrong", "x.npz", "--output-format", "json") == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "different"
    assert call("port", "nan.npz") == 3
    for name, inputs, flags, words in (
        ("empty", "x.npz", (), "m.py, line 8: ZeroDivisionError"),
        ("nope", "x.npz", (), "has no 'nope'"),
        ("port", "nothing.npz", (), "no such file"),
        ("port", "m.py", (), "not an array"),
        ("port", "x.npz", ("--layout", "A->B"), "layout"),
        ("port", "x.npz", ("--name", "weight"), "TENSOR=LEAF"),
    ):
        with pytest.raises(UserError, match=words):
            call(name, inputs, *flags)
