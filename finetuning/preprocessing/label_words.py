"""Label words: finding them in the answers of a data file, and choosing those that an answer may be."""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from finetuning.cli.console import fail, warn
from finetuning.preprocessing.rows import NO_TASK

# Answers are label words if there are few of them, they are short, and each comes often.
MOST_LABELS = 200
LONGEST_LABEL = 40  # characters
ROWS_PER_LABEL = 3
MOST_COUNTED = 10_000  # different answers of a task; with more of them they are texts


@dataclass
class AnswerCounts:
    """The answers of a task: how many, and which, as long as they may be label words."""

    count: int = 0
    words: dict[str, None] | None = field(default_factory=dict)  # in order of appearance; None if answers are texts

    def add(self, answer: str) -> None:
        self.count += 1
        if not 0 < len(answer) <= LONGEST_LABEL or "\n" in answer:
            self.words = None
        elif self.words is not None:
            self.words[answer] = None

    def merge(self, other: "AnswerCounts") -> None:
        """Add the answers that follow."""
        self.count += other.count
        if self.words is None or other.words is None or len(self.words) > MOST_COUNTED:
            self.words = None
        else:
            self.words.update(other.words)

    def labels(self) -> list[str] | None:
        """The label words; None if the answers are texts, or too few to tell."""
        if not self.words or len(self.words) < 2 or ROWS_PER_LABEL * len(self.words) > self.count:
            return None
        return list(self.words)


def find_labels(answers: list[str]) -> list[str] | None:
    """The label words among a task's answers, in order of appearance; None if the answers are texts."""
    counts = AnswerCounts()
    for answer in answers:
        counts.add(answer)
    return counts.labels()


def warn_about_labels(labels: dict[str, list[str]]) -> None:
    """Name label words that look the same, and tasks with more of them than `--labels auto` knows.

    Args:
        labels: of each task.
    """
    for task, words in labels.items():
        for one, other in look_alikes(words):
            warn(f"task '{task}': the answers {one!r} and {other!r} are different label words; is one of them a typo?")
        if len(words) > MOST_LABELS:
            warn(f"task '{task}' has {len(words)} label words: --labels auto knows at most {MOST_LABELS} of a task")


def look_alikes(labels: list[str]) -> list[tuple[str, str]]:
    """Pairs of labels that differ only in spaces, in capitals or in the width of their characters."""
    seen: dict[str, str] = {}
    pairs = []
    for label in labels:
        plain = "".join(unicodedata.normalize("NFKC", label).casefold().split())
        if plain in seen:
            pairs.append((seen[plain], label))
        seen.setdefault(plain, label)
    return pairs


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels in `--labels`: words with commas between, or a JSON list, which can hold any text."""
    try:
        labels = json.loads(text) if text.lstrip().startswith("[") else re.split("[,，]", text)
    except ValueError as error:
        fail(f"--labels {text}: not a JSON list: {error}")
    labels = tuple(label.strip() if isinstance(label, str) else "" for label in labels)
    if len(labels) < 2 or "" in labels or len(set(labels)) < len(labels):
        example = """正面,负面 or, for words with commas, '["a, b", "c"]'"""
        fail(f"--labels {text}: name two or more different words: {example}")
    return labels


def choose_labels(wanted: str, rows: list[dict[str, Any]], known: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """The labels for each row: those given with `--labels` or, with auto, those of its task in the training data.

    Args:
        known: what `Summary.labels` found in the training data.

    Raises:
        SystemExit: code 2, if there are fewer than two labels, or none are known for a row's task.
    """
    if wanted != "auto":
        return [parse_labels(wanted)] * len(rows)
    if not known:
        fail(
            "--labels auto: the adapter knows no label words (short answers that are repeated in its training data);\n"
            "name the words: --labels 正面,负面"
        )
    many = {task: labels for task, labels in known.items() if len(labels) > MOST_LABELS}
    chosen = []
    for number, row in enumerate(rows, 1):
        task = str(row.get("task", NO_TASK))
        if len(known) == 1 and (task == NO_TASK or NO_TASK in known):  # the only task there is, here or in training
            task = next(iter(known))
        if task not in known:
            its_task = f"is of task '{task}', for" if "task" in row else "names no 'task', without"
            fail(
                f"--labels auto: row {number} {its_task} which the training data had no label words;\n"
                f"add --tasks {','.join(known)}, or name the words: --labels 正面,负面"
            )
        if task in many:
            fail(
                f"--labels auto: task '{task}' has {len(many[task])} label words in the training data, more than the "
                f"{MOST_LABELS} that are chosen from;\nname the words: --labels 正面,负面"
            )
        chosen.append(tuple(known[task]))
    return chosen
