"""Quantized matrices: one packed form for every scheme, and one translator file per scheme."""
