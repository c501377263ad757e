"""Whether a request can be served at all: a pure check against the limits, with a sentence for the client."""

from __future__ import annotations

from math import isfinite, prod

from textmill.core import Image, Request, RunnerLimits, Sampling


def longest_total(limits: RunnerLimits, max_total_tokens: int | None = None) -> int:
    """The most tokens (prompt and output) one sequence may have: the model's, the setting's and the memory's bound."""
    return limits.longest if max_total_tokens is None else min(limits.longest, max_total_tokens)


def refusal(request: Request, total: int, vocab_size: int, encodes: bool = False, sees: bool = False) -> str:
    """Why the request cannot be served; empty if it can. `total` is from `longest_total`; others: see the limits."""
    tokens = request.tokens
    if not tokens:
        return "the prompt has no tokens"
    if len(tokens) + 1 > total:
        return f"the prompt has {len(tokens)} tokens, and one more would exceed the {total} that one request may have"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return f"the prompt holds a token id outside the vocabulary of {vocab_size}"
    reason = encoder_refusal(request.encoder_tokens, total, vocab_size, encodes)
    if not reason and request.images:
        reason = image_refusal(request.images, len(tokens), sees)
    if reason:
        return reason
    if request.max_new_tokens < 1:
        return "max_new_tokens must be at least 1"
    if not 0 <= request.top_n_tokens <= vocab_size:
        return f"top_n_tokens must be between 0 and {vocab_size}"
    return sampling_refusal(request.sampling)


def encoder_refusal(tokens: tuple[int, ...], total: int, vocab_size: int, encodes: bool) -> str:
    """Why these tokens cannot go to the encoder; empty if they can, or if there are none and no encoder either."""
    if not tokens:
        return "the encoder has nothing to read" if encodes else ""
    if not encodes:
        return "the model has no encoder"
    if len(tokens) > total:
        return f"the encoder has {len(tokens)} tokens to read, and {total} are the most"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return f"the encoder has a token id outside the vocabulary of {vocab_size} to read"
    return ""


def image_refusal(images: tuple[Image, ...], total: int, sees: bool) -> str:
    """Why these pictures cannot be shown to the model; empty if they can. `total`: tokens of the prompt."""
    if not sees:
        return "the model takes no images"
    end = 0
    for image in images:
        if image.start < end or image.count < 1 or image.start + image.count > total:
            return "the places of images in the prompt overlap, or lie outside it"
        end = image.start + image.count
        if len(image.shape) != 4 or image.shape[1] != 3 or len(image.pixels) != prod(image.shape) or not image.pixels:
            return f"an image of shape {image.shape} has {len(image.pixels)} bytes"
        if (len(image.size), len(image.mean), len(image.std)) != (2, 3, 3) or min(*image.size, *image.std) <= 0:
            return "an image's size or scale makes no sense"
    return ""


def sampling_refusal(sampling: Sampling) -> str:
    """Why these sampling numbers cannot be used; empty if they can. Not-a-number fails every comparison."""
    if not (isfinite(sampling.temperature) and sampling.temperature > 0):
        return "temperature must be a positive number"
    if sampling.top_k < 0:
        return "top_k must not be negative"
    if not 0 < sampling.top_p <= 1:
        return "top_p must be above 0 and at most 1"
    if not 0 < sampling.typical_p <= 1:
        return "typical_p must be above 0 and at most 1"
    if not (isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        return "repetition_penalty must be a positive number"
    if not isfinite(sampling.frequency_penalty):
        return "frequency_penalty must be a finite number"
    return ""
