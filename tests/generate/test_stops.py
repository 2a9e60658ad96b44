"""Stop texts against a reference that reads the whole text character by character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from andromeda.generate.sequence import StopMatcher


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop text that is completed; of several completed at once, the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


letters = st.text("abc", max_size=12)


@given(st.lists(letters, max_size=8), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_any_cut_of_the_text_gives_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", False
    expected, expects_stop = reference("".join(pieces), stops)
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        # Never more than the answer, and what is held back is the beginning of a stop text.
        assert expected.startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += matcher.finish()
    assert (shown, stopped) == (expected, expects_stop)


@given(st.lists(letters, max_size=8), st.text("abc", min_size=1, max_size=5))
def test_no_more_is_held_back_than_may_begin_a_stop_text(pieces: list[str], stop: str) -> None:
    matcher, seen, shown = StopMatcher([stop]), "", ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        if stopped:
            return
        seen, shown = seen + piece, shown + text
        held = seen[len(shown) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(seen[start:]) for start in range(len(shown)))
