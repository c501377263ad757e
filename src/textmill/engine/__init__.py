"""The engine: which tokens are computed next, in which blocks, for whom. Integers only; no torch."""
