"""Galactica's sequences ([START_DNA]ACGT[END_DNA]): each character is a token, by a mark that the tokenizer drops.

As the authors' galai does it (`escape_custom_split_sequence`), but offsets still refer to the text without marks.
"""

from __future__ import annotations

import re

import tokenizers

MARK = "SPL1T-TH1S-Pl3A5E"  # what the tokenizer's pre-tokenizer splits at and removes

_SEQUENCE = re.compile(r"\[START_(DNA|SMILES|I_SMILES|AMINO)\](.*?)\[END_\1\]")


def knows_marks(backend: tokenizers.Tokenizer) -> bool:
    """True for a tokenizer that was trained with marks."""
    steps = backend.pre_tokenizer
    return steps is not None and MARK.encode() in steps.__getstate__()  # its str() fails on some regexes


def with_marks(text: str) -> tuple[str, list[int]]:
    """The text with a mark around every character of its sequences, and where each character of the result was in it.

    A mark's characters are where the next character was.
    """
    pieces: list[str] = []
    places: list[int] = []
    end = 0
    for match in _SEQUENCE.finditer(text):
        start, stop = match.span(2)
        pieces.append(text[end:start])
        places += range(end, start)
        for place in range(start, stop):
            pieces += [MARK, text[place]]
            places += [place] * (len(MARK) + 1)
        pieces.append(MARK)
        places += [stop] * len(MARK)
        end = stop
    return "".join([*pieces, text[end:]]), [*places, *range(end, len(text))]
