"""The cross-check: identical weights into JAX, PyTorch and a NumPy specification, and a verdict that names the side."""
