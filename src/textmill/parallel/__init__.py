"""Ranks of one model: who holds which part, and the sums and joins between them."""
