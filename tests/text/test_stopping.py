"""Stop strings end a text right after themselves, wherever the pieces are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from textmill.text.detokenize import Piece
from textmill.text.stopping import StopMatcher


def feed(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    out = ""
    for part in parts:
        text, matched = matcher.push(part)
        out += text
        if matched:
            return out, True
    return out, False


def test_inside_one_piece() -> None:
    assert feed(["."], ["One. Two."]) == ("One.", True)


def test_across_pieces_and_inside_the_last() -> None:
    assert feed(["END"], ["x E", "N", "D and more"]) == ("x END", True)


def test_the_first_to_end_wins() -> None:
    assert feed(["abcd", "bc"], ["xabcde"]) == ("xabc", True)
    assert feed(["abcd", "bc"], ["xab", "cde"]) == ("xabc", True)


def test_no_stop_and_empty_stop_never_match() -> None:
    assert feed([], ["a", "b"]) == ("ab", False)
    assert feed([""], ["a", "b"]) == ("ab", False)


def test_after_a_match_nothing_comes() -> None:
    matcher = StopMatcher(["a"])
    assert matcher.push("ab") == ("a", True)
    assert matcher.push("more") == ("", True)


def test_a_piece_is_cut_in_both_its_texts() -> None:
    assert StopMatcher(["."]).push_piece(Piece("x. y", "x. y")) == (Piece("x.", "x."), True)


def test_a_special_token_can_be_a_stop_string() -> None:
    assert StopMatcher(["<end>"]).push_piece(Piece("<end>", "")) == (Piece("<end>", ""), True)


@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
)
def test_equal_to_searching_the_whole_text(stops: list[str], parts: list[str]) -> None:
    whole = "".join(parts)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    expected = (whole[: min(ends)], True) if ends else (whole, False)
    assert feed(stops, parts) == expected
