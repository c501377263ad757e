"""Pieces of a stream add up to the whole text, whatever the ids; incomplete characters are held back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from textmill.text.detokenize import Piece, StreamDecoder
from textmill.text.tokenizer import BYTES, Tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> tuple[list[Piece], str]:
    decoder = StreamDecoder(tokenizer, prompt)
    return [decoder.push(number) for number in ids], decoder.flush()


def visible(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    shown, rest = pieces(tokenizer, prompt, ids)
    return "".join(piece.visible for piece in shown) + rest


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30), prompt=st.lists(st.integers(0, 49151), max_size=8))
def test_any_ids_of_a_byte_level_model(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> None:
    assert visible(tokenizer, prompt, ids) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24), specials=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 16)), max_size=3))
def test_any_bytes_of_a_byte_level_model(tokenizer: Tokenizer, data: bytes, specials: list[tuple[int, int]]) -> None:
    """Single bytes, in any order, with special tokens between them: all kinds of broken characters."""
    known = [tokenizer.backend.token_to_id(letter) for letter in letters(data)]
    ids = [number for number in known if number is not None]
    for at, special in specials:
        ids.insert(at, special)
    assert visible(tokenizer, [504], ids) == tokenizer.decode(ids)
    text = "".join(piece.text for piece in pieces(tokenizer, [504], ids)[0])
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith(text)


def letters(data: bytes) -> list[str]:
    by_byte = {byte: letter for letter, byte in BYTES.items()}
    return [by_byte[byte] for byte in data]


@settings(max_examples=300, deadline=None)
@given(prompt=st.text(alphabet="hello wrdé€😀\n", max_size=8), text=st.text(alphabet="hello wrdé€😀\n"))
def test_any_text_of_a_sentencepiece_model(sentencepiece: Tokenizer, prompt: str, text: str) -> None:
    before = sentencepiece.encode(prompt).ids
    ids = sentencepiece.encode("x" + text, add_special_tokens=False).ids
    whole = sentencepiece.decode([*before, *ids])
    context = sentencepiece.decode(before)
    assert visible(sentencepiece, before, ids) == whole[len(context) :]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 283), max_size=40))
def test_any_ids_of_a_sentencepiece_model_end_in_bounded_work(sentencepiece: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(sentencepiece, [1])
    for number in ids:
        decoder.push(number)
        assert len(decoder._visible._window) <= 16  # type: ignore[attr-defined]


def test_a_character_comes_whole_with_its_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Ü 😀!").ids
    shown, rest = pieces(tokenizer, [504], ids)
    assert [piece.text for piece in shown] == ["", "Ü", "", " 😀", "!"]
    assert rest == ""


def test_a_broken_end_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hi 😀").ids[:-1]
    shown, rest = pieces(tokenizer, [504], ids)
    assert [piece.visible for piece in shown] == ["Hi", ""]
    assert rest == " \ufffd"


def test_special_tokens_have_text_but_are_not_visible(tokenizer: Tokenizer) -> None:
    shown, _ = pieces(tokenizer, [504], [*tokenizer.encode("Hi").ids, 2])
    assert shown[-1] == Piece("<|im_end|>", "")


def test_spaces_between_words_of_a_sentencepiece_model(sentencepiece: Tokenizer) -> None:
    prompt = sentencepiece.encode("hello").ids
    ids = sentencepiece.encode("world the world", add_special_tokens=False).ids
    assert [piece.visible for piece in pieces(sentencepiece, prompt, ids)[0]] == [" world", " the", " world"]
    assert visible(sentencepiece, [1], ids) == "world the world"
