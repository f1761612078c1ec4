"""`one-model convert-checkpoint`, from a checkout: the program is llm_tools/programs/convert_checkpoint.py."""

from llm_common.errors import run_main
from llm_tools.programs.convert_checkpoint import main

if __name__ == "__main__":
    run_main(main)
