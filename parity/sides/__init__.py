"""JAX and PyTorch behind one interface, with taps on what passes between their modules."""
