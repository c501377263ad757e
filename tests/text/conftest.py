"""Tokenizers for the tests of this folder: the default model's, and a small one in sentencepiece's manner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from textmill.text import gguf_tokenizer
from textmill.text.tokenizer import Ends, Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """<unk> <s> </s>, the 256 bytes, letters, and a few words that can be merged."""
    words = [
        "▁",
        *"abcdehlorstw",
        "he",
        "ll",
        "hell",
        "hello",
        "▁w",
        "or",
        "▁wor",
        "▁world",
        "ld",
        "the",
        "▁the",
        "▁hello",
    ]
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(word, 1) for word in words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces],
        "tokenizer.ggml.scores": [-float(number) for number in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": item for key, item in changes.items()}


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    backend = gguf_tokenizer.build(sentencepiece_metadata(), Path("small.gguf"))
    return Tokenizer(backend, Ends(bos_token="<s>", eos_token="</s>", eos_ids=(2,)))
