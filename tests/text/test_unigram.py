"""Unigram vocabularies, from tokenizer.model and from GGUF metadata, give the ids that sentencepiece gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.text.test_sentencepiece_model import TEXTS, trained
from textmill.errors import ModelError
from textmill.text import gguf_tokenizer
from textmill.text.sentencepiece_model import metadata_of
from textmill.text.tokenizer import load_tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "t5": {},
    "bytes": {"byte_fallback": True},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
}
MORE = ["a\u3000b", "\u200bx", "é e\u0301"]


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_sentencepieces(tmp_path: Path, way: str) -> None:
    options = {"vocab_size": 360, **WAYS[way]}
    expected = trained(tmp_path, model_type="unigram", **options)
    metadata = metadata_of((tmp_path / "tokenizer.model").read_bytes())
    assert metadata["tokenizer.ggml.model"] == "t5"
    # GGUF files hold the map as a list of numbers.
    listed = {"tokenizer.ggml.precompiled_charsmap": list(metadata["tokenizer.ggml.precompiled_charsmap"])}
    of_file = load_tokenizer(tmp_path).backend
    of_metadata = gguf_tokenizer.build(metadata | listed, Path("small.gguf"))
    for text in [*TEXTS, *MORE]:
        ids = expected.encode(text)
        for backend in (of_file, of_metadata):
            assert backend.encode(text, add_special_tokens=False).ids == ids, text
    plain = "The miller grinds."
    assert of_metadata.decode(expected.encode(plain)) == plain


def test_a_text_ends_with_the_end_token(tmp_path: Path) -> None:
    expected = trained(tmp_path, model_type="unigram", vocab_size=360)
    metadata = metadata_of((tmp_path / "tokenizer.model").read_bytes())
    backend = gguf_tokenizer.build(metadata, Path("small.gguf"))
    assert backend.encode("the mill").ids == [*expected.encode("the mill"), 2]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"unknown_token_id": 10**6}, "unknown_token_id"),
        ({"precompiled_charsmap": [1, 2, 3]}, "precompiled_charsmap"),
        ({"scores": [0.0]}, "scores"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    trained(tmp_path, model_type="unigram", vocab_size=360)
    metadata = metadata_of((tmp_path / "tokenizer.model").read_bytes())
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelError, match=rf"small\.gguf: tokenizer\.ggml\.{problem}"):
        gguf_tokenizer.build(changed, Path("small.gguf"))
