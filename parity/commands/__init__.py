"""What `parity` does when it is typed: run, pair, trace, sharded, mutants, demo, calibrate."""
