"""`one-model inspect-data`, from a checkout: the program is llm_tools/programs/inspect_data.py."""

from llm_common.errors import run_main
from llm_tools.programs.inspect_data import main

if __name__ == "__main__":
    run_main(main)
