"""Training on many devices: the meshes, the planted bugs, and runs that change their mesh, on processes of this machine."""

import pytest

from parity.sharded import GROUPS, QUICK, SHARDING_BUGS, plant, run_group

QUICK_BUGS = ("norm of a process's own gradients", "mean of every process's own mean", "the same data on all devices")


@pytest.mark.parametrize("group", QUICK, ids=str)
def test_a_mesh_gives_what_the_specification_gives(group):
    rows = run_group(group)
    assert len(rows) == 8 * len(group.cases)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("bug", [b for b in SHARDING_BUGS if b.name in QUICK_BUGS], ids=lambda bug: bug.name)
def test_a_planted_sharding_bug_goes_red(bug):
    caught, red = plant(bug)
    assert caught, red


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_mesh(group):
    assert [row for row in run_group(group) if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("bug", [b for b in SHARDING_BUGS if b.name not in QUICK_BUGS], ids=lambda bug: bug.name)
def test_every_planted_sharding_bug(bug):
    caught, red = plant(bug)
    assert caught, red
