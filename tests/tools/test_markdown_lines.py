"""Generated pages: lines are wrapped, and what they say is unchanged."""

from __future__ import annotations

from tools.markdown_lines import WIDTH, wrap


def test_long_paragraphs_and_items_are_wrapped_and_nothing_else() -> None:
    words = " ".join(f"word{i}" for i in range(60))
    apart = [f"| {words} |", f"# {words}", "```", words, "- " + words, "```", f"`andromeda train {words}`"]
    page = "\n".join([words, "", "- " + words, "- short", "", "Two lines", "that are short.", "", *apart, ""])
    wrapped = wrap(page)
    assert wrapped.split() == page.split()
    assert wrapped.endswith("\n".join(["- short", "", "Two lines", "that are short.", "", *apart, ""]))
    prose = wrapped[: wrapped.index("| word0")].split("\n")
    assert max(map(len, prose)) <= WIDTH
    assert len([line for line in prose if line.startswith("- ")]) == 2
    assert [line for line in prose if line.startswith("  ")], "items keep their indent"
    assert wrap(wrapped) == wrapped
