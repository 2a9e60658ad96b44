"""Generated reasoning tasks: each draws problems, knows the score of guessing, and has a solver that shows they can be solved.

Training scores a model on their default sizes (`andromeda.train.callbacks.probes`). The evaluation adds larger ones, out of that
distribution (`andromeda.evaluate.tasks.reasoning`).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

PromptT = TypeVar("PromptT", str, tuple[int, ...])
"""Text, which a tokenizer spells, or token ids."""


class ReasoningProblem(NamedTuple, Generic[PromptT]):
    """What is given, and the only right continuation."""

    prompt: PromptT
    answer: PromptT


class ReasoningTask(Protocol[PromptT]):
    """A kind of problem."""

    chance: float
    """Expected score of guessing: an answer of the right kind, chosen as well as possible without relating the question to
    what stands before it."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[PromptT]:
        """A problem. alphabet: token ids that may be used."""

    def solve(self, prompt: PromptT) -> PromptT:
        """The answer, from the prompt alone."""


EXAMPLES = 4
"""Solved examples before the question of a text task."""


class Arithmetic:
    """`3 + 4 = 7`, five times; the last sum is asked for and is never among the examples."""

    def __init__(self, first: int = 0, count: int = 10) -> None:
        """Summands are the `count` whole numbers from `first` on."""
        self._first, self._count = first, count
        self.chance = 1 / count
        """The most frequent sum is that of `count` of the count² pairs (nine of digits, 109 of numbers of two digits)."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five different pairs."""
        drawn = random.sample(range(self._count**2), EXAMPLES + 1)
        *examples, asked = [(self._first + pair // self._count, self._first + pair % self._count) for pair in drawn]
        lines = [f"{a} + {b} = {a + b}\n" for a, b in examples]
        return ReasoningProblem("".join(lines) + f"{asked[0]} + {asked[1]} =", f" {sum(asked)}")

    def solve(self, prompt: str) -> str:
        """Add the summands of the last line."""
        a, _, b, _ = prompt.splitlines()[-1].split()
        return f" {int(a) + int(b)}"


class AssociativeRecall:
    """k1 v1 k2 v2 ... ki -> vi, all tokens different (arXiv 2312.04927)."""

    def __init__(self, pairs: int = 8) -> None:
        self._pairs = pairs
        self.chance = 1 / pairs
        """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[tuple[int, ...]]:
        """The pairs and the key of one of them."""
        tokens = random.sample(list(alphabet), 2 * self._pairs)
        asked = 2 * random.randrange(self._pairs)
        return ReasoningProblem((*tokens, tokens[asked]), (tokens[asked + 1],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)


class Induction:
    """s1 ... sn s1 ... sj -> s(j+1), all different, j from 4 to n - 1 (arXiv 2209.11895)."""

    SHORTEST_REPETITION = 4

    def __init__(self, length: int = 16) -> None:
        self._length = length
        self.chance = 1 / length
        """One of the tokens of the sequence."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[tuple[int, ...]]:
        """A sequence and the beginning of its repetition."""
        sequence = tuple(random.sample(list(alphabet), self._length))
        again = random.randint(self.SHORTEST_REPETITION, self._length - 1)
        return ReasoningProblem(sequence + sequence[:again], (sequence[again],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)


class MultiHop:
    """Four chains `a = 3`, `b = a`, ..., the lines of a hop in random order; then `assert b ==`, whose value is that of its chain."""

    CHAINS = 4
    chance = 1 / CHAINS
    """One of the values that were seen."""

    def __init__(self, aliases: int = 1) -> None:
        """aliases: variables of a chain that are set to another one."""
        self._variables = aliases + 1

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Variables with different names and four different digits."""
        names = random.sample(string.ascii_lowercase, self._variables * self.CHAINS)
        values = random.sample(range(10), self.CHAINS)
        chains = [(str(value), *names[self._variables * i : self._variables * (i + 1)]) for i, value in enumerate(values)]
        lines: list[str] = []
        for hop in range(self._variables):
            assignments = [f"{chain[hop + 1]} = {chain[hop]}\n" for chain in chains]
            random.shuffle(assignments)
            lines += assignments
        value, *_, asked = random.choice(chains)
        return ReasoningProblem("".join(lines) + f"assert {asked} ==", f" {value}")

    def solve(self, prompt: str) -> str:
        """Follow the names to a digit."""
        *lines, question = prompt.splitlines()
        bound = dict(line.split(" = ") for line in lines)
        found = question.split()[1]
        while found in bound:
            found = bound[found]
        return f" {found}"


class Parity:
    """`1 0 1 1 : 1`, five times; the last parity is asked for. Every bit counts, so that no part of the bits tells anything."""

    chance = 0.5
    """Half of all bit strings are even."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five bit strings."""
        strings = [[random.randrange(2) for _ in range(self._bits)] for _ in range(EXAMPLES + 1)]
        lines = [f"{' '.join(map(str, bits))} : {sum(bits) % 2}\n" for bits in strings[:-1]]
        return ReasoningProblem("".join(lines) + f"{' '.join(map(str, strings[-1]))} :", f" {sum(strings[-1]) % 2}")

    def solve(self, prompt: str) -> str:
        """Count the ones of the last line."""
        return f" {prompt.splitlines()[-1].count('1') % 2}"


CLOSING = {"(": ")", "[": "]", "{": "}"}


class DyckLanguage:
    """`( [ ] { : } )`, five times: the brackets that close what is open, innermost first. The last answer is asked for."""

    def __init__(self, depth: int) -> None:
        """depth: brackets left open."""
        self._depth = depth
        self.chance = len(CLOSING) ** -depth
        """The kinds of the open brackets are drawn uniformly and independently."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five strings of brackets, with closed pairs between the open ones."""
        strings = [self._string(random) for _ in range(EXAMPLES + 1)]
        lines = [f"{' '.join(brackets)} : {closing_brackets(brackets)}\n" for brackets in strings[:-1]]
        return ReasoningProblem("".join(lines) + f"{' '.join(strings[-1])} :", f" {closing_brackets(strings[-1])}")

    def _string(self, random: Random) -> list[str]:
        brackets: list[str] = []
        for _ in range(self._depth):
            brackets.append(random.choice(list(CLOSING)))
            if random.random() < 0.5:
                pair = random.choice(list(CLOSING))
                brackets += [pair, CLOSING[pair]]
        return brackets

    def solve(self, prompt: str) -> str:
        """Close what is open in the last line."""
        return f" {closing_brackets(prompt.splitlines()[-1].split()[:-1])}"


def closing_brackets(brackets: Sequence[str]) -> str:
    """What closes all that a string of brackets leaves open."""
    stack: list[str] = []
    for bracket in brackets:
        if bracket in CLOSING:
            stack.append(bracket)
        else:
            stack.pop()
    return " ".join(CLOSING[bracket] for bracket in reversed(stack))
