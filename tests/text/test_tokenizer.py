"""Tokenizers from GGUF metadata and from folders: ids, byte offsets, ends, special tokens, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from textmill.errors import ModelError
from textmill.text import gguf_tokenizer
from textmill.text.tokenizer import BYTES, Tokenizer, load_tokenizer

HERE = Path("small.gguf")
ANSWER = " Paris.\n\nThe answer is: 2018"
LETTERS = {byte: letter for letter, byte in BYTES.items()}


def byte_metadata(pre: str | None, /, **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary of GPT-2's 256 letters and one special token."""
    tokens = ["<|end|>", *BYTES, "in", "ing"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, *[1] * (len(tokens) - 1)],
        "tokenizer.ggml.merges": ["i n", "in g"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": item for key, item in changes.items()}


def test_the_default_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode([7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40]) == ANSWER
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    assert [number for number in range(100) if tokenizer.is_special(number)] == list(range(17))
    assert tokenizer.chat_template is not None
    assert tokenizer.is_byte_level


def test_special_tokens_in_text_are_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.token_text(2) == "<|im_end|>"


def test_digits_stand_alone_for_this_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("in 2024  7").texts == ["in", " ", "2", "0", "2", "4", "  ", "7"]


def test_offsets_count_bytes_and_characters_are_whole(tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode("Ünï 😀 x")
    assert encoding.offsets == [(0, 2), (0, 2), (2, 3), (3, 5), (5, 10), (6, 10), (10, 12)]
    assert encoding.texts == ["Ü", "Ü", "n", "ï", " 😀", "😀", " x"]


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    # Some control characters have no token in this vocabulary; like any unknown letter they vanish, as in TGI.
    assume(all(tokenizer.backend.token_to_id(LETTERS[byte]) is not None for byte in text.encode()))
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert b"".join(tokenizer.token_bytes(number) for number in encoding.ids) == text.encode()
    data = text.encode()
    assert all(0 <= start <= stop <= len(data) for start, stop in encoding.offsets)
    assert encoding.texts == [data[start:stop].decode() for start, stop in encoding.offsets]


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "1" * 500_000, "é\n" * 250_000])
def test_a_long_hostile_text_takes_linear_time(tokenizer: Tokenizer, text: str) -> None:
    started = time.perf_counter()
    encoding = tokenizer.encode(text)
    assert len(encoding.offsets) == len(encoding.ids)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        (None, ["It", "'s", " 2024", " ", " 7"]),
        ("gpt-2", ["It", "'s", " 2024", " ", " 7"]),
        ("smollm", ["It", "'s", " ", "2", "0", "2", "4", "  ", "7"]),
        ("llama-bpe", ["It", "'s", " ", "202", "4", " ", " ", "7"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", " ", " ", "7"]),
        ("falcon", ["It", "'", "s", " ", "202", "4", " ", " 7"]),
        ("default", ["It", "'", "s", " ", "202", "4", " ", " ", "7"]),
        ("bloom", ["It's", " 2024", " ", " 7"]),
        ("gpt-4o", ["It's", " ", "202", "4", " ", " ", "7"]),
        ("tekken", ["It", "'s", " ", "2", "0", "2", "4", " ", " ", "7"]),
        ("deepseek-v3", ["It", "'s", " ", "202", "4", "  ", "7"]),
        ("deepseek-coder", ["It", "'", "s", " ", "2", "0", "2", "4", "  ", "7"]),
    ],
)
def test_pre_tokenizers(pre: str | None, pieces: list[str]) -> None:
    backend = gguf_tokenizer.build(byte_metadata(pre), HERE)
    text = "It's 2024  7"
    cut = [text[start:stop] for _, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_a_file_without_a_name_is_cut_as_its_architecture_was(caplog: pytest.LogCaptureFixture) -> None:
    metadata = byte_metadata(None) | {"general.architecture": "starcoder"}
    backend = gguf_tokenizer.build(metadata, HERE)
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a12")] == ["a", "1", "2"]
    assert "names no pre-tokenizer" in caplog.text


def test_merges_and_ends_of_a_byte_level_vocabulary() -> None:
    plain = gguf_tokenizer.build(byte_metadata("gpt-2"), HERE)
    assert plain.encode("singing").tokens == ["s", "ing", "ing"]
    ended = gguf_tokenizer.build(byte_metadata("gpt-2", add_bos_token=True, add_eos_token=True), HERE)
    assert ended.encode("a").tokens == ["<|end|>", "a", "<|end|>"]
    assert ended.encode("a", add_special_tokens=False).tokens == ["a"]
    assert gguf_tokenizer.build(byte_metadata("llama-bpe"), HERE).encode("a").tokens == ["<|end|>", "a"]


def test_sentencepiece(sentencepiece: Tokenizer) -> None:
    encoding = sentencepiece.encode("hello world")
    assert [sentencepiece.backend.id_to_token(number) for number in encoding.ids] == ["<s>", "▁hello", "▁world"]
    assert encoding.offsets == [(0, 0), (0, 5), (5, 11)]
    assert encoding.texts == ["", "hello", " world"]
    assert sentencepiece.decode(encoding.ids) == "hello world"
    assert not sentencepiece.is_byte_level
    other = sentencepiece.encode("é€", add_special_tokens=False)
    names = [sentencepiece.backend.id_to_token(number) for number in other.ids]
    assert names == ["▁", "<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>"]
    assert sentencepiece.decode(other.ids) == "é€"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "unheard-of"}, "model: 'unheard-of'"),
        ({"pre": "unheard-of"}, "pre: .*'unheard-of'"),
        ({"pre": ["x"]}, "pre"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"tokens": ["a", "b", "a"]}, "tokens: 1 tokens occur twice"),
        ({"tokens": ["a" * (2 << 20)]}, "tokens: a token is longer"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": ["i unknown"]}, "merges"),
        ({"bos_token_id": 10**6, "add_bos_token": True}, "bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token"),
    ],
)
def test_wrong_metadata_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=rf"small\.gguf: tokenizer\.ggml\.{problem}"):
        gguf_tokenizer.build(byte_metadata("gpt-2", **changes), HERE)


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder with the default model's tokenizer."""
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token="<|endoftext|>")
    return tmp_path


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def test_a_folder_gives_the_same_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_tokenizer(folder)
    text = "The capital of <|im_end|> 2024 😀"
    assert loaded.encode(text).ids == tokenizer.encode(text).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.eos_ids) == ("<|endoftext|>", "<|im_end|>", (2,))
    assert loaded.chat_template is None


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer(folder: Path) -> None:
    write(folder / "config.json", eos_token_id=9)
    assert load_tokenizer(folder).eos_ids == (9, 2)
    write(folder / "generation_config.json", eos_token_id=[0, 3])
    assert load_tokenizer(folder).eos_ids == (0, 3, 2)
    write(folder / "generation_config.json", eos_token_id=["x"])
    with pytest.raises(ModelError, match="eos_token_id"):
        load_tokenizer(folder)


def test_where_the_chat_template_is_found(folder: Path) -> None:
    write(folder / "processor_config.json", chat_template="processor")
    assert load_tokenizer(folder).chat_template == "processor"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "config"}]
    write(folder / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(folder).chat_template == "config"
    write(folder / "chat_template.json", chat_template="json")
    assert load_tokenizer(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(folder).chat_template == "jinja"
    write(folder / "own.json", chat_template="own", eos_token="<file_sep>")
    own = load_tokenizer(folder, tokenizer_config_path=folder / "own.json")
    assert (own.chat_template, own.eos_token, own.bos_token) == ("own", "<file_sep>", None)


def test_llama_classes_get_their_ends_from_the_config(folder: Path) -> None:
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizerFast"}
    write(folder / "tokenizer_config.json", **ends)
    assert load_tokenizer(folder).encode("The").ids == [1, 504]
    write(folder / "tokenizer_config.json", **ends, add_bos_token=False, add_eos_token=True)
    assert load_tokenizer(folder).encode("The").ids == [504, 2]


def test_folders_without_a_readable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_loading_is_quick_and_never_imports_torch(default_model: Path) -> None:
    code = (
        "import sys, time; started = time.perf_counter()\n"
        "from textmill.text.tokenizer import load_tokenizer\n"
        "from textmill.text import chat, detokenize, stopping\n"
        f"load_tokenizer({str(default_model)!r})\n"
        "print(time.perf_counter() - started, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[1:] == ["False", "False"]
    assert float(out[0]) < 3  # 0.2 s on a quiet machine
