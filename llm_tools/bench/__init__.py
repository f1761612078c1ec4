"""The benchmark: what is measured, peers beside it, and the tables."""
