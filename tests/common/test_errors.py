"""Errors as a library raises them and as a program prints them."""

import pytest

from llm_common.errors import UserError, run_main


def test_a_program_says_the_flag_of_a_field(capsys):
    def main():
        raise UserError("`seq_len` 0: take a larger `batch_size`, not seq_len; see `Run.resume`")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "error: --seq-len 0: take a larger --batch-size, not seq_len; see `Run.resume`\n"
