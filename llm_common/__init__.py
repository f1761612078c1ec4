"""What belongs to neither framework: config, tokenizer, data, canonical tensors, RoPE table, random bits, step scalars.

Both models import this package, and it imports neither of them nor JAX nor PyTorch.
"""
