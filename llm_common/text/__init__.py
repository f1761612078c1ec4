"""Texts: characters to tokens and back, chat templates, files that hold text."""
