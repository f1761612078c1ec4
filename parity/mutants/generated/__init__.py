"""Bugs that nobody chose: drawn from the syntax trees of the files that decide numbers."""
