"""The metadata of torch's distributed checkpoints is read and not run, in memory that follows its size."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from llm_common.errors import UserError
from llm_common.files.dcp_metadata import read_metadata


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(protocol, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"storage_data": Evil(tmp_path / "done")}, protocol))
    with pytest.raises(UserError, match="mkdir, which no checkpoint needs"):
        read_metadata(tmp_path)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x04N.",
        pickle.dumps(5),
        pickle.dumps({"a": 1}),
        b"cos\nsystem\n.",
        b"\x80\x04}r\x00\x00\x00\x0a.",
        b"\x80\x05\x95" + b"\xff" * 9,
    ],
)
def test_what_is_no_metadata(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="not the metadata of a DCP checkpoint"):
        read_metadata(tmp_path)


def test_a_claim_of_much_memory_costs_none(tmp_path):
    """Nine bytes that ask for a memo of 160 million places: C's unpickler makes them."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04}r" + (0x0A000000).to_bytes(4, "little") + b".")
    code = (
        "import resource, sys; from pathlib import Path; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from llm_common.files.dcp_metadata import read_metadata\n"
        "try: read_metadata(Path(sys.argv[1]))\nexcept ValueError as e: print(type(e).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "UserError\n"
