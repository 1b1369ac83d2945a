"""Stop strings found in pieces are those that a search of the whole text finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.gateway.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab.é", max_size=12)
STOPS = st.lists(st.text(alphabet="ab.é", min_size=1, max_size=4), max_size=4)


def search(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What of a whole text is output, and whether a stop string ends it: the slow, plain way."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def passed_by(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    finder = StopStrings(stops)
    passed = ""
    for piece in pieces:
        text, found = finder.push(piece)
        passed += text
        if found:
            return passed, True
    return passed + finder.flush(), False


def cuttings(text: str) -> list[list[str]]:
    """Every way of cutting a text in pieces, empty ones aside."""
    ways = []
    for cuts in itertools.product((False, True), repeat=max(len(text) - 1, 0)):
        places = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(text)]
        ways.append([text[a:b] for a, b in itertools.pairwise(places)])
    return ways


@settings(deadline=None)
@given(text=st.text(alphabet="ab", max_size=7), stops=STOPS)
def test_every_cutting_gives_what_a_whole_search_gives(text: str, stops: list[str]) -> None:
    wanted = search(text, stops)
    for pieces in cuttings(text):
        assert passed_by(pieces, stops) == wanted, pieces


@settings(deadline=None)
@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_pieces_of_any_length_also_empty_ones(pieces: list[str], stops: list[str]) -> None:
    assert passed_by(pieces, stops) == search("".join(pieces), stops)


@settings(deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    passed = seen = ""
    for character in text:
        new, found = finder.push(character)
        passed, seen = passed + new, seen + character
        if found:
            break
        beginnings = (
            length
            for stop in stops
            for length in range(1, len(stop))
            if seen.endswith(stop[:length])
        )
        assert seen == passed + seen[len(seen) - max(beginnings, default=0) :]


@pytest.mark.parametrize(
    ("stops", "pieces", "wanted"),
    [
        (["abc", "b"], ["a", "b", "c"], ("a", True)),  # the one that ends first
        (["b", "ab", "cab"], ["xca", "b"], ("x", True)),  # of those that end together, the longest
        (["aab"], ["aa", "aab"], ("aa", True)),  # a false start inside the real one
        (["###"], ["##", " #", "##!"], ("## ", True)),
        (["END"], ["EN", "EN"], ("ENEN", False)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", True)),
        ([], ["any", "thing"], ("anything", False)),
    ],
)
def test_worked_examples(stops: list[str], pieces: list[str], wanted: tuple[str, bool]) -> None:
    assert passed_by(pieces, stops) == wanted


def test_flush_gives_what_was_held_and_only_once() -> None:
    finder = StopStrings(["stop"])
    assert finder.push("a sto") == ("a ", False)
    assert finder.flush() == "sto"
    assert finder.flush() == ""


def test_a_stop_string_longer_than_the_answer_loses_nothing() -> None:
    finder = StopStrings(["ab" * 20_000 + "!"])
    text = "".join(finder.push("ab")[0] for _ in range(200)) + finder.push("?")[0]
    assert text == "ab" * 200 + "?"
