"""What the programs in `scripts/` are made of: command lines, loading, printing, measuring."""
