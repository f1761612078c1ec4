"""A reference and a candidate of anybody's: the same program or not?"""

from parity.judge.judge import judge
from parity.judge.maps import Map, Part
from parity.judge.testing import assert_same
from parity.judge.verdict import Verdict

__all__ = ["Map", "Part", "Verdict", "assert_same", "judge"]
