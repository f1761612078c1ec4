"""`one-model train`, from a checkout: the program is llm_tools/programs/train.py."""

from llm_common.errors import run_main
from llm_tools.programs.train import main

if __name__ == "__main__":
    run_main(main)
