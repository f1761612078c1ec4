"""Pairs of strangers' models: a correct one is the same at the first try, a broken one is different, at its place."""

import pytest

from parity.judge import judge
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
