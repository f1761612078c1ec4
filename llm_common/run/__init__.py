"""A run: its folder, log, checkpoints and progress; what it needs, where it computes."""
