"""Reasoning tasks: solvers at 100 %, chance by counting, and the rules of multiple choice and GSM8K on hand-made questions."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from random import Random

import pytest

from andromeda.data.reasoning_tasks import CLOSING, closing_brackets
from andromeda.evaluate.questions import asked_range, read_choices, read_solved
from andromeda.evaluate.tasks.lm_eval_tasks import final_number, grade
from andromeda.evaluate.tasks.reasoning import REASONING
from andromeda.utils.errors import DataError, RequestError

FORMS = [(name, form) for name in REASONING for form in (0, 1)]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_solver_is_always_right_and_sees_the_prompt_alone(name: str, form: int) -> None:
    task, random = REASONING[name][form], Random(0)
    for _ in range(300):
        problem = task.draw(random, range(300))
        assert task.solve(problem.prompt) == problem.answer


@pytest.mark.parametrize(("name", "form"), [("digits", 1), ("parity", 0), ("parity", 1), ("dyck", 0), ("recall", 1), ("multihop", 1)])
def test_no_fixed_answer_beats_chance(name: str, form: int) -> None:
    """The likeliest answer, or where answers stand in the prompt a place in it, is right as often as chance says."""
    task, random, count = REASONING[name][form], Random(1), 6000
    problems = [task.draw(random, range(300)) for _ in range(count)]
    if name == "recall":
        hits = sum(p.prompt[1] == p.answer[0] for p in problems)
    elif name == "multihop":
        hits = sum(p.prompt.splitlines()[0].split(" = ")[1] == p.answer.strip() for p in problems)
    else:
        hits = max(Counter(p.answer for p in problems).values())
    if name == "digits":
        sums = Counter(a + b for a, b in product(range(10, 100), repeat=2))
        assert task.chance == max(sums.values()) / sum(sums.values())
        hits = sum(p.answer == " 109" for p in problems)
    deviation = (task.chance * (1 - task.chance) / count) ** 0.5
    # The most frequent of nine answers is above their mean by a few deviations.
    assert abs(hits / count - task.chance) < 4 * deviation


def test_the_depth_of_dyck_is_what_is_left_open() -> None:
    for depth, pair in zip((2, 6), REASONING["dyck"], strict=True):
        problem = pair.draw(Random(0), [])
        for line in problem.prompt.splitlines()[:-1]:
            row, answer = line.split(" : ")
            assert len(answer.split()) == depth
            stack = []
            for bracket in (row + " " + answer).split():
                if bracket in CLOSING:
                    stack.append(CLOSING[bracket])
                else:
                    assert stack.pop() == bracket
            assert not stack
    assert closing_brackets(["(", "[", "]", "{"]) == "} )"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### 18.", "18"),
        ("#### 2.50", "2.50"),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_the_final_number(answer: str, number: str | None) -> None:
    assert final_number(answer) == number


def test_only_the_right_number_is_right() -> None:
    solved = {"question": "?", "answer": "half of 36\n#### 1,018"}
    assert grade(solved, [" it is #### 1018."]) == {"exact_match": 1.0, "answered": 1.0}
    assert grade(solved, [" it is 1018"]) == {"exact_match": 0.0, "answered": 0.0}
    assert grade(solved, [" it is #### 10"]) == {"exact_match": 0.0, "answered": 1.0}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_numbers_letters_or_texts(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["x", "y", "z"], "answer": answer} for answer in (2, "C", "c", "z")]
    assert {one.right for one in read_choices(write(tmp_path / "a.jsonl", *rows))} == {2}


@pytest.mark.parametrize(
    "row", [{"question": "q"}, {"question": "q", "choices": ["x"], "answer": 0}, {"question": "q", "choices": ["x", "y"], "answer": 2}, [1]]
)
def test_questions_that_are_none(tmp_path: Path, row: object) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read_choices(write(tmp_path / "a.jsonl", row))


def test_examples_are_never_asked(tmp_path: Path) -> None:
    assert list(asked_range(10, 4, None)) == [4, 5, 6, 7, 8, 9]
    assert list(asked_range(10, 4, 2)) == [4, 5]
    with pytest.raises(RequestError, match="leave none"):
        asked_range(4, 4, None)
    with pytest.raises(DataError, match="Question 1"):
        read_solved(write(tmp_path / "a.jsonl", {"question": "q", "answer": 3}))
