"""Planted bugs: the catalogue, and whether the ladder catches each at its side and place."""
