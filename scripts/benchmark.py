"""`one-model benchmark`, from a checkout: the program is llm_tools/programs/benchmark.py."""

from llm_common.errors import run_main
from llm_tools.programs.benchmark import main

if __name__ == "__main__":
    run_main(main)
