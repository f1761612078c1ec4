"""The programs of `one-model`: each a docstring, its flags, and what is called with them."""
