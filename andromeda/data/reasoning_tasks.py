"""Generated reasoning tasks: each draws problems, knows the score of guessing, and has a solver that shows they can be
solved.

Training scores a model on them (`andromeda.train.callbacks.probes`), the evaluation adds harder variants
(`andromeda.evaluate.reasoning_problems`)."""

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


class Arithmetic:
    """`3 + 4 = 7`, five times; the last sum is asked for. Never is the question among the examples."""

    chance = 0.1
    """Nine is the sum of ten of the hundred pairs, and no other sum of more."""
    EXAMPLES = 4

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Five different pairs of digits."""
        *examples, asked = [divmod(pair, 10) for pair in random.sample(range(100), self.EXAMPLES + 1)]
        lines = [f"{a} + {b} = {a + b}\n" for a, b in examples]
        return ReasoningProblem("".join(lines) + f"{asked[0]} + {asked[1]} =", f" {sum(asked)}")

    def solve(self, prompt: str) -> str:
        """Add what stands in the last line."""
        a, _, b, _ = prompt.splitlines()[-1].split()
        return f" {int(a) + int(b)}"


class AssociativeRecall:
    """k1 v1 k2 v2 ... k8 v8 ki -> vi, all tokens different."""

    PAIRS = 8
    chance = 1 / PAIRS
    """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[tuple[int, ...]]:
        """Eight pairs and the key of one of them."""
        tokens = random.sample(list(alphabet), 2 * self.PAIRS)
        asked = 2 * random.randrange(self.PAIRS)
        return ReasoningProblem((*tokens, tokens[asked]), (tokens[asked + 1],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)


class Induction:
    """s1 ... s16 s1 ... sj -> s(j+1), all different, j from 4 to 15."""

    LENGTH = 16
    SHORTEST = 4
    chance = 1 / LENGTH
    """One of the tokens of the sequence."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[tuple[int, ...]]:
        """A sequence and the beginning of its repetition."""
        sequence = tuple(random.sample(list(alphabet), self.LENGTH))
        again = random.randint(self.SHORTEST, self.LENGTH - 1)
        return ReasoningProblem(sequence + sequence[:again], (sequence[again],))

    def solve(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The token after the first occurrence of the last one."""
        return (prompt[prompt.index(prompt[-1]) + 1],)


class MultiHop:
    """Four chains `a = 3`, `b = a` in mixed order; then `assert b ==`, which takes the way over `a`."""

    CHAINS = 4
    chance = 1 / CHAINS
    """One of the values that were seen."""

    def draw(self, random: Random, alphabet: Sequence[int]) -> ReasoningProblem[str]:
        """Eight variables with different names and four different digits."""
        names = random.sample(string.ascii_lowercase, 2 * self.CHAINS)
        values = random.sample(range(10), self.CHAINS)
        chains = [(names[2 * i], names[2 * i + 1], value) for i, value in enumerate(values)]
        first = [f"{a} = {value}\n" for a, _, value in chains]
        second = [f"{b} = {a}\n" for a, b, _ in chains]
        for lines in (first, second):
            random.shuffle(lines)
        _, asked, value = random.choice(chains)
        return ReasoningProblem("".join(first + second) + f"assert {asked} ==", f" {value}")

    def solve(self, prompt: str) -> str:
        """Follow the names until there is a digit."""
        *lines, question = prompt.splitlines()
        bound = dict(line.split(" = ") for line in lines)
        found = question.split()[1]
        while found in bound:
            found = bound[found]
        return f" {found}"
