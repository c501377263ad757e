"""vocab.json and merges.txt give the ids that transformers' own classes give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from textmill.errors import ModelError
from textmill.text.tokenizer import load_tokenizer

CORPUS = ["the mill grinds the grain", "It's 2024, and they've mills", "def grind(grain):\n    return 42"] * 3
TEXTS = [*CORPUS[:3], "", "  two  spaces ", "é 磨坊 🦀", "the<|endoftext|>mill<extra>x", "e\u0301"]


def made(folder: Path, **config: Any) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("oracle", "config"),
    [
        (GPT2Tokenizer, {"tokenizer_class": "GPT2Tokenizer"}),
        (GPT2Tokenizer, {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
        (GPT2Tokenizer, {"added_tokens_decoder": {"330": {"content": "<extra>", "special": False}}}),
        (Qwen2Tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>"}),
    ],
)
def test_ids_are_transformers(tmp_path: Path, oracle: Any, config: dict[str, Any]) -> None:
    folder = made(tmp_path, **config)
    expected = oracle.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == expected(text)["input_ids"], text
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(
            ids, clean_up_tokenization_spaces=False
        )


def test_a_begin_token_where_the_config_asks_for_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made(tmp_path, bos_token="<|endoftext|>", add_bos_token=True))
    assert tokenizer.encode("the").ids == [0, *tokenizer.encode("the", add_special_tokens=False).ids]
    assert (tokenizer.bos_token, tokenizer.is_special(0)) == ("<|endoftext|>", True)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="BlenderbotTokenizer"):
        load_tokenizer(made(tmp_path, tokenizer_class="BlenderbotTokenizer"))
    folder = made(tmp_path)
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nthe\n")
    with pytest.raises(ModelError, match=r"merges\.txt: line 3"):
        load_tokenizer(folder)
    (folder / "merges.txt").write_text("t unheard-of\n")
    with pytest.raises(ModelError, match=r"merges\.txt"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": "b"}))
    with pytest.raises(ModelError, match=r"vocab\.json"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        load_tokenizer(folder)
