"""The ladder: every check of the two sides against the specification."""
