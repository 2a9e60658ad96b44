"""Invented words and numbers: any number of them offline, none in any training text, none the beginning of another."""

from __future__ import annotations

from random import Random

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LETTERS = 6
DIGITS = 7


def words(random: Random, count: int) -> list[str]:
    """Different words of three syllables."""
    numbers = random.sample(range(len(SYLLABLES) ** 3), count)
    return [_word(number) for number in numbers]


def _word(number: int) -> str:
    size = len(SYLLABLES)
    return SYLLABLES[number // size**2] + SYLLABLES[number // size % size] + SYLLABLES[number % size]


def numbers(random: Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in random.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)]
