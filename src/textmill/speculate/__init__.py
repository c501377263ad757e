"""Guessing the next tokens of a sequence: who proposes, and when it pays. Integers only; no torch."""
