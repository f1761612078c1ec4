"""The language model as objects: modules own parameters, the optimizer owns its state, the trainer owns both.

Read in this order: layers, rope, attention, model, loss, optim, sampling. The twin of every file is in `jax_llm`.
"""
