"""`one-model plot-runs`, from a checkout: the program is llm_tools/programs/plot_runs.py."""

from llm_common.errors import run_main
from llm_tools.programs.plot_runs import main

if __name__ == "__main__":
    run_main(main)
