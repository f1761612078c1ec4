"""Tokens and the order in which a run reads them; examples with answers; held-out data."""
