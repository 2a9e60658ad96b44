"""How problems are worded. The same problems in English and as Python source: a model of code reads its own language.

Every line ends in a newline, so that tokens of lines that are encoded one by one spell the text. Questions end where the first
answer begins; `lead` stands before the first answer and `comma` before the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One language."""

    header: str
    list_header: str
    """Before a list of words."""
    list_end: str
    noise: tuple[str, ...]
    """Lines that say nothing, in turn."""
    fact: str
    """A key has a value."""
    first: str
    """A variable is set to a value."""
    alias: str
    """A variable is set to another variable."""
    question: str
    """The value of one key."""
    all_values: str
    """All values of one key."""
    several_keys: str
    """The values of several keys."""
    variables: str
    """All variables that hold a value."""
    common: str
    """The `count` words that come most often."""
    lead: str = " "
    comma: str = ", "

    def pattern(self, template: str) -> re.Pattern[str]:
        """What finds a template's filled lines: {names} match words."""
        escaped = re.escape(template.rstrip("\n"))
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", escaped))


STYLES = {
    "prose": Style(
        header="Some facts are hidden in the text below. Remember them: questions follow.\n",
        list_header="Some words come more often than others in the list below. Remember which: a question follows.\n",
        list_end="\n",
        noise=(
            "The grass is green and the sky is blue.\n",
            "The sun is warm and the wind is mild.\n",
            "Here we go again, there and back.\n",
            "One day follows the other, and nobody minds.\n",
        ),
        fact="The secret number of {key} is {value}.\n",
        first="The variable {name} is set to {value}.\n",
        alias="The variable {name} is set to the variable {other}.\n",
        question="Question: what is the secret number of {key}?\nAnswer: The secret number of {key} is",
        all_values="Question: what are all the secret numbers of {key}?\nAnswer: The secret numbers of {key} are",
        several_keys="Question: what are the secret numbers of {keys}?\nAnswer: The secret numbers of {keys} are",
        variables="Question: which variables are set to {value}?\nAnswer: The variables that are set to {value} are",
        common="Question: which {count} words come most often in the list?\nAnswer: The {count} words that come most often are",
    ),
    "code": Style(
        header="from settings import register\n",
        list_header='words = """\n',
        list_end='\n"""\n',
        noise=("for item in items:\n", "    total += item\n", "if total > limit:\n", "    total = 0\n"),
        fact="register({key}, {value})\n",
        first="{name} = {value}\n",
        alias="{name} = {other}\n",
        question="assert lookup({key}) == (",
        all_values="assert lookup_all({key}) == [",
        several_keys="assert lookup_each({keys}) == [",
        variables="assert names_of({value}) == [",
        common="assert most_common(words, {count}) == [",
        lead="",
    ),
}
"""By name."""
