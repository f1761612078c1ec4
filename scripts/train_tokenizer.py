"""`one-model train-tokenizer`, from a checkout: the program is llm_tools/programs/train_tokenizer.py."""

from llm_common.errors import run_main
from llm_tools.programs.train_tokenizer import main

if __name__ == "__main__":
    run_main(main)
