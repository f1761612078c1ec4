"""`python -m parity`: the same as the console script `parity`."""

from parity.commands.cli import entry

if __name__ == "__main__":
    entry()
