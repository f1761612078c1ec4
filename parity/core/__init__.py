"""What every check stands on: how figures are compared, inputs and cases, how a bug is planted."""
