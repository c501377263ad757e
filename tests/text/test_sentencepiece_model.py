"""A tokenizer.model gives the ids that sentencepiece gives, for every way in which such files are made."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from textmill.errors import ModelError
from textmill.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The miller grinds the grain, and the mill grinds slowly but exceedingly fine.",
    "In 2024 there were 1024 mills; 3.14 of them stood by the river.",
    "Der Müller mahlt das Korn, die Mühle mahlt langsam. 磨坊在河边。",
    "def grind(grain):\n    return [kernel for kernel in grain if kernel]",
] * 4
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two spaces  between   words ",
    "\tTabs\nand lines\r\n",
    "unseen: ß ø 🦀 ☃ Ωmega",
    "the the theatre of the mills",
    "ﬁne ① Ａ",
]
WAYS: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "baichuan": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<reserved_1>", "<reserved_2>"],
    },
    "defaults": {},
    "unigrams": {"model_type": "unigram", "vocab_size": 160},
    "unigrams with bytes": {
        "model_type": "unigram",
        "vocab_size": 380,
        "byte_fallback": True,
        "unk_id": 2,
        "pad_id": 0,
        "bos_id": 3,
        "eos_id": 1,
    },
    "without bytes": {"normalization_rule_name": "nfkc", "split_digits": True},
}


def trained(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **({"model_type": "bpe", "vocab_size": 420, "minloglevel": 2} | options),
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text("{}")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_sentencepieces(tmp_path: Path, way: str) -> None:
    expected = trained(tmp_path, **WAYS[way])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == expected.vocab_size()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text), text
        if "byte_fallback" in WAYS[way]:
            assert tokenizer.decode(ids) == expected.decode(ids), text


def test_the_config_beside_it_says_what_is_added(tmp_path: Path) -> None:
    trained(tmp_path)
    bare = load_tokenizer(tmp_path).encode("the mill", add_special_tokens=False).ids

    def ids(**config: Any) -> list[int]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path).encode("the mill").ids

    assert ids() == [1, *bare]
    assert ids(add_bos_token=False) == bare
    assert ids(add_bos_token=True, add_eos_token=True) == [1, *bare, 2]


def test_tokens_beyond_the_file(tmp_path: Path) -> None:
    size = trained(tmp_path).vocab_size()
    added = {str(size): {"content": "<|user|>", "special": True}, "1": {"content": "<s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert size in tokenizer.encode("the <|user|> mill").ids
    assert tokenizer.is_special(size)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-7],
    "empty": lambda data: b"",
    "something else": lambda data: b"\x7fELF" + bytes(100),
}


@pytest.mark.parametrize("how", BROKEN)
def test_other_files_are_refused_by_name(tmp_path: Path, how: str) -> None:
    trained(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_comes_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trained(tmp_path)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == tokenizer.vocab_size
