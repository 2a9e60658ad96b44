"""Retrieval from long contexts, in the manner of RULER (arXiv 2404.06654): problems are generated, so that nothing is downloaded
and no text was seen in training, and every task has a solver that scores 100 % and a known score of guessing."""

from andromeda.evaluate.retrieval.counting import Counting
from andromeda.evaluate.retrieval.needles import Needles
from andromeda.evaluate.retrieval.problem import Task
from andromeda.evaluate.retrieval.variables import Variables

RETRIEVAL: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("single", unseen=9),
        Needles("needles", distractors=9, crowded=True),
        Needles("multikey", distractors=9),
        Needles("multivalue", values=4, distractors=8),
        Needles("multiquery", keys=4, distractors=8),
        Variables(),
        Counting("common", answers=5, others=5, zipf=False),
        Counting("frequent", answers=3, others=3, zipf=True),
    )
}
"""By name."""

__all__ = ["RETRIEVAL", "Task"]
