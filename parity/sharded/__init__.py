"""Training on many devices against training on one."""
