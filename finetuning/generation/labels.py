"""Label words: those of a task, and those that `--labels` lets an answer be."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from finetuning.cli.console import fail, warn
from finetuning.preprocessing.rows import NO_TASK, Row, as_label, task_of
from finetuning.preprocessing.summary import Summary

# Answers are label words if there are few of them, they are short, and each comes often.
MOST_LABELS = 200  # of a task that `--labels auto` knows
ROWS_PER_LABEL = 3
MOST_ODD = 0.01  # share of a task's answers that may be no label words, such as one empty answer among 2,000


def labels_of_tasks(summary: Summary) -> dict[str, list[str]]:
    """The label words of each task of the data that has some."""
    counts: dict[str, dict[str | None, int]] = {}
    for answer in summary.answers:
        counts.setdefault(answer["task"], {})[answer["label"]] = answer["count"]
    found = {task: label_words(of_task, MOST_ODD) for task, of_task in counts.items()}
    return {task: labels for task, labels in found.items() if labels}


def find_labels(answers: Iterable[str]) -> list[str] | None:
    """The label words among a task's answers, in order of appearance; None if the answers are texts."""
    return label_words(Counter(map(as_label, answers)))


def label_words(counts: dict[str | None, int], most_odd: float = 0) -> list[str] | None:
    """The label words of a task; None if its answers are texts, or too few to tell.

    Args:
        counts: how often each answer comes, in order of appearance; None stands for those that are no label words.
        most_odd: share of the answers that may be none.
    """
    words, total = [word for word in counts if word is not None], sum(counts.values())
    is_task = len(words) > 1 and ROWS_PER_LABEL * len(words) <= total and counts.get(None, 0) <= most_odd * total
    return words if is_task else None


def warn_about_labels(summary: Summary) -> None:
    """Name label words that look the same, answers that are none, and tasks with more than `--labels auto` knows."""
    odd = {answer["task"]: answer["first"] for answer in summary.answers if answer["label"] is None}
    for task, labels in labels_of_tasks(summary).items():
        for one, other in look_alikes(labels):
            warn(f"task '{task}': the answers {one!r} and {other!r} are different label words; is one of them a typo?")
        if len(labels) > MOST_LABELS:
            warn(f"task '{task}' has {len(labels)} label words: --labels auto knows at most {MOST_LABELS} of a task")
        if task in odd:
            warn(f"task '{task}' has {len(labels)} label words, but the answer in row {odd[task]} is empty or long")


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


def choose_labels(wanted: str, rows: list[Row], known: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """The labels for each row: those given with `--labels` or, with auto, those of its task in the training data.

    Args:
        known: the label words of each task in the training data: `labels_of_tasks`.

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
        task = task_of(row)
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
