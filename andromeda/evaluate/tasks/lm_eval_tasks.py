"""Evaluations by lm-evaluation-harness: its own tasks, a user's from a folder, and a user's questions from a JSONL file.

A file of questions becomes a task of the harness that is built here. Its first questions are the solved examples (`--num-fewshot`) and are
never asked.
"""

from __future__ import annotations

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig, StringTuple
from andromeda.config.validation_errors import validate
from andromeda.evaluate.loaded_model import LoadedModel, file_sha256
from andromeda.evaluate.questions import MultipleChoiceQuestion, WordProblem, asked_range, read_choices, read_solved
from andromeda.evaluate.request import EvalOptions, Measurement, existing_file
from andromeda.evaluate.result import safe_file_name
from andromeda.utils.errors import MissingExtra, RequestError, nearest
from andromeda.utils.progress_callback import ProgressCallback

Questions = list[MultipleChoiceQuestion | WordProblem]
NEW_TOKENS = 256
FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
"""Of GSM8K's answers (arXiv 2110.14168)."""


class QuestionSettings(BaseConfig):
    """A file of questions; None asks all."""

    file: str
    shots: NonNegativeInt
    samples: PositiveInt | None


class QuestionEvaluation(ABC):
    """Questions of a user's file as a task of the harness."""

    kind: str
    purpose: str
    default_shots = 0
    default_samples: int | None = None

    @abstractmethod
    def questions(self, path: Path) -> Questions:
        """The file's questions. Raises an AndromedaError, one sentence."""

    @abstractmethod
    def task(self) -> dict[str, Any]:
        """The harness's configuration of the task."""

    @abstractmethod
    def figures(self, found: dict[str, Any], asked: Questions) -> dict[str, float]:
        """The results, from the harness's metrics."""

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """The file, and how many solved examples and questions."""
        loaded.tokenizer(self.purpose)
        path, shots = existing_file(options.file, self.kind), self.default_shots if options.shots is None else options.shots
        asked_range(len(self.questions(path)), shots, options.samples)
        require_lm_eval(self.purpose)
        return [QuestionSettings(file=str(path), shots=shots, samples=options.samples or self.default_samples)]

    def read(self, values: dict[str, Any]) -> QuestionSettings:
        """Settings that were stored."""
        return validate(QuestionSettings, values)

    def measure(self, loaded: LoadedModel, settings: QuestionSettings, report: ProgressCallback) -> Measurement:
        """The figures of the questions that are asked, after the examples."""
        path = existing_file(settings.file, self.kind)
        questions = self.questions(path)
        asked: Questions = [questions[i] for i in asked_range(len(questions), settings.shots, settings.samples)]
        found = _ask(loaded, {"task": self.kind} | self.task(), questions[: settings.shots], asked, report)
        result = self.figures(found, asked) | {"questions": len(asked), "shots": settings.shots}
        return Measurement(safe_file_name(f"{self.kind}-{path.stem}-{settings.shots}"), file_sha256(path), result)


class MultipleChoiceEvaluation(QuestionEvaluation):
    """Multiple choice: the most likely answer, and the most likely one per byte. Without examples by default."""

    kind = "fewshot"
    purpose = "Multiple choice"

    def questions(self, path: Path) -> Questions:
        """Questions with their choices."""
        return list(read_choices(path))

    def task(self) -> dict[str, Any]:
        """Each choice is scored by its likelihood after the question."""
        return {
            "output_type": "multiple_choice",
            "doc_to_text": prompt_of,
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["right"],
            "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
        }

    def figures(self, found: dict[str, Any], asked: Questions) -> dict[str, float]:
        """Both accuracies, and that of guessing."""
        chance = sum(1 / len(one.choices) for one in asked if isinstance(one, MultipleChoiceQuestion)) / len(asked)
        return {"accuracy": found["acc,none"], "normalized": found["acc_bytes,none"], "chance": chance}


class Gsm8kEvaluation(QuestionEvaluation):
    """Word problems: whether the number after #### is right. Four examples and at most 100 questions by default."""

    kind = "gsm8k"
    purpose = "GSM8K"
    default_shots = 4
    default_samples = 100

    def questions(self, path: Path) -> Questions:
        """Questions with their solutions, each of which ends in a number."""
        questions = read_solved(path)
        for number, one in enumerate(questions, 1):
            if final_number(one.answer) is None:
                raise RequestError(f"Question {number} of {path} has no final number: its answer must end in `#### 42`.")
        return list(questions)

    def task(self) -> dict[str, Any]:
        """The answer is the greedy continuation. One without a final number is wrong."""
        return {
            "output_type": "generate_until",
            "doc_to_text": prompt_of,
            "doc_to_target": lambda row: row["answer"],
            "generation_kwargs": {"until": ["\n\nQuestion:"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
            "process_results": grade,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("exact_match", "answered")],
        }

    def figures(self, found: dict[str, Any], asked: Questions) -> dict[str, float]:
        """Exact match of the final number, and the share of answers that have one."""
        return {"exact_match": found["exact_match,none"], "answered": found["answered,none"]}


def prompt_of(row: dict[str, Any]) -> str:
    """A question up to where its answer begins."""
    return f"Question: {row['question']}\nAnswer:"


def final_number(answer: str) -> str | None:
    """The number that an answer ends in, without thousands separators and the full stop that may follow it."""
    found = FINAL_NUMBER.search(answer)
    return found[1].replace(",", "").rstrip(".") if found else None


def grade(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """The scores of one answer, as the harness asks for them."""
    number = final_number(answers[0])
    return {"exact_match": float(number is not None and number == final_number(row["answer"])), "answered": float(number is not None)}


def _ask(
    loaded: LoadedModel,
    task: dict[str, Any],
    examples: Questions,
    asked: Questions,
    report: ProgressCallback,
) -> dict[str, Any]:
    """The harness's metrics of a task over questions in memory. Raises RequestError for a question that does not fit."""
    require_lm_eval("Questions")
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM, ContextOverflow

    splits = {"test": Dataset.from_list([one._asdict() for one in asked])}
    config = task | {"custom_dataset": lambda **_: splits, "test_split": "test", "num_fewshot": len(examples)}
    if examples:
        splits["examples"] = Dataset.from_list([one._asdict() for one in examples])
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    model = AndromedaLM(loaded.model, loaded.tokenizer("Questions"), truncate=False, report=report)
    try:
        found = _simple_evaluate(model, [config], TaskManager(include_defaults=False), shots=None, samples=None, seed=0)
    except ContextOverflow as error:
        what, fix = ("with its examples ", "give a lower --num-fewshot") if examples else ("", "leave out what is longer")
        raise RequestError(
            f"A question {what}has {error.tokens} tokens, more than this model's context of {loaded.context}: {fix}."
        ) from None
    metrics: dict[str, Any] = found["results"][task["task"]]
    return metrics


class HarnessSettings(BaseConfig):
    """Tasks by their names there; None leaves examples and number of questions to each task."""

    tasks: StringTuple
    include: str
    shots: NonNegativeInt | None
    samples: PositiveInt | None
    seed: NonNegativeInt


class HarnessEvaluation:
    """Tasks of lm-evaluation-harness by their names."""

    kind = "harness"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """The tasks that are named."""
        require_lm_eval("The evaluation harness")
        loaded.tokenizer("The evaluation harness")
        if not options.tasks:
            raise RequestError("The evaluation harness needs a task: name one with --harness-task, such as --harness-task hellaswag.")
        if options.include and not Path(options.include).is_dir():
            raise RequestError(f"There is no folder {options.include}: give the folder of your tasks with --include-path.")
        return [
            HarnessSettings(tasks=options.tasks, include=options.include, shots=options.shots, samples=options.samples, seed=options.seed)
        ]

    def read(self, values: dict[str, Any]) -> HarnessSettings:
        """Settings that were stored."""
        return validate(HarnessSettings, values)

    def measure(self, loaded: LoadedModel, settings: HarnessSettings, report: ProgressCallback) -> Measurement:
        """Every metric that the harness computes. Raises MissingExtra where it is not installed."""
        require_lm_eval("The evaluation harness")
        from andromeda.evaluate.lm_eval_adapter import AndromedaLM

        model = AndromedaLM(loaded.model, loaded.tokenizer("The evaluation harness"), report=report)
        tasks = _task_manager(settings)
        try:
            found = _simple_evaluate(model, list(settings.tasks), tasks, settings.shots, settings.samples, settings.seed)
        except (OSError, ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"{' and '.join(settings.tasks)} cannot be run ({reason}): is its data on this machine?") from None
        result = {
            task: {metric.removesuffix(",none"): float(value) for metric, value in metrics.items() if _is_metric(metric, value)}
            for task, metrics in found["results"].items()
        }
        hashes = sorted(str(sample["doc_hash"]) for samples in found["samples"].values() for sample in samples)
        name = safe_file_name("harness-" + "-".join(settings.tasks))
        return Measurement(name, hashlib.sha256(" ".join(hashes).encode()).hexdigest(), result)


def _simple_evaluate(model: Any, tasks: list[Any], manager: Any, shots: int | None, samples: int | None, seed: int) -> dict[str, Any]:
    """The harness's own evaluation, silent and without bootstrapped errors."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=shots,
        limit=samples,
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return found


def _task_manager(settings: HarnessSettings) -> Any:
    """What knows the tasks. Raises RequestError for one that does not exist."""
    from lm_eval.tasks import TaskManager

    if settings.include:
        # A folder of a few tasks is read at once, the harness's own thousands take seconds.
        own = TaskManager(include_path=settings.include, include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    tasks = TaskManager(include_path=settings.include or None)
    for name in settings.tasks:
        if name not in tasks.all_tasks:
            raise RequestError(f"lm-evaluation-harness has no task {name!r}{nearest(name, tasks.all_tasks)}: see --include-path.")
    return tasks


def _is_metric(name: str, value: Any) -> bool:
    """Whether a figure is one of the model, not of the task's size."""
    return isinstance(value, int | float) and not name.startswith("sample_")


def require_lm_eval(purpose: str) -> None:
    """Raises MissingExtra, which names the install command, where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval", "harness", purpose)
