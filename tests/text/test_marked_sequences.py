"""Galactica's marked sequences: one token a character, offsets of the text as it was sent, others untouched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from textmill.text.marked_sequences import MARK, with_marks
from textmill.text.tokenizer import Tokenizer, load_tokenizer

MERGES = [("A", "C"), ("G", "T"), ("AC", "GT")]


def folder_with(folder: Path, *, marks: bool) -> Path:
    """A byte-level tokenizer that would take ACGT for one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(pair) for pair in MERGES)]
    backend = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Split(MARK, "removed")] if marks else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, levels])
    backend.add_special_tokens(["[START_DNA]", "[END_DNA]"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    return folder


@pytest.fixture
def galactica(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(folder_with(tmp_path, marks=True))


def test_a_sequence_is_one_token_a_character(galactica: Tokenizer) -> None:
    encoding = galactica.encode("ACGT [START_DNA]ACGT[END_DNA] ACGT")
    expected = ["ACGT", " ", "[START_DNA]", "A", "C", "G", "T", "[END_DNA]", " ", "ACGT"]
    assert encoding.texts == expected


def test_offsets_count_bytes_of_the_text_without_marks(galactica: Tokenizer) -> None:
    text = "é[START_DNA]AéC[END_DNA]é"
    encoding = galactica.encode(text)
    data = text.encode()
    assert [data[start:stop].decode() for start, stop in encoding.offsets] == [
        *("é", "é", "[START_DNA]", "A", "é", "é", "C", "[END_DNA]", "é", "é")  # two byte tokens a letter with an accent
    ]


@pytest.mark.parametrize(
    "text", ["[START_DNA]ACGT", "[START_DNA]ACGT[END_AMINO]", "[START_DNA]AC\nGT[END_DNA]", "ACGT"]
)
def test_what_is_no_sequence_stays(galactica: Tokenizer, text: str) -> None:
    assert with_marks(text) == (text, list(range(len(text))))
    assert "AC" in galactica.encode(text).texts or "ACGT" in galactica.encode(text).texts


def test_other_tokenizers_see_the_text_itself(tmp_path: Path) -> None:
    plain = load_tokenizer(folder_with(tmp_path, marks=False))
    assert plain.encode("[START_DNA]ACGT[END_DNA]").texts == ["[START_DNA]", "ACGT", "[END_DNA]"]


@given(st.lists(st.sampled_from(["[START_DNA]", "[END_DNA]", "[START_AMINO]", "[END_AMINO]", "A", "é", " ", "\n"])))
def test_marks_as_the_authors_put_them(pieces: list[str]) -> None:
    text = "".join(pieces)

    def escape(match: re.Match[str]) -> str:  # galai's rule
        inner = re.sub("(.)", rf"{MARK}\1", match.group(3), flags=re.DOTALL)
        return f"{match.group(1)}{inner}{MARK}{match.group(4)}"

    marked, origins = with_marks(text)
    assert marked == re.sub(r"(\[START_(DNA|SMILES|I_SMILES|AMINO)])(.*?)(\[END_\2])", escape, text)
    assert len(marked) == len(origins)
    assert marked.replace(MARK, "") == text
