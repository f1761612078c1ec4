"""`one-model evaluate`, from a checkout: the program is llm_tools/programs/evaluate.py."""

from llm_common.errors import run_main
from llm_tools.programs.evaluate import main

if __name__ == "__main__":
    run_main(main)
