"""Probes: small generated reasoning tasks, scored while a model trains.

Each is a task with a known score of guessing and a solver that scores 100 %, so that a score says something. All are
scored by greedy exact match, in one batched forward pass: when every token of the answer is the model's first choice given
the right ones before it, greedy decoding would have produced exactly that answer.
"""

from andromeda.train.callbacks.probes.score import TASKS, Probes, build_probes
from andromeda.train.callbacks.probes.task import Problem, Task

__all__ = ["TASKS", "Probes", "Problem", "Task", "build_probes"]
