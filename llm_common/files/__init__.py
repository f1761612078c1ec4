"""Tensors on disk: safetensors, Hugging Face folders, what other formats say about theirs."""
