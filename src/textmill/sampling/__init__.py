"""From logits to a token: pure functions over a batch with one row of parameters per sequence.

This is the meaning; the CPU path's native sampler is tested against it.
"""
