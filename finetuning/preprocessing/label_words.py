"""Label words: finding them in the answers of a data file, and choosing those that an answer may be."""

import re
from typing import Any

from finetuning.cli.console import fail
from finetuning.preprocessing.rows import NO_TASK, by_task, expected_answer

# Answers are label words if there are few of them, they are short, and each comes often.
MOST_LABELS = 50
LONGEST_LABEL = 40  # characters
ROWS_PER_LABEL = 3


def find_labels(answers: list[str]) -> list[str] | None:
    """The label words among a task's answers, in order of appearance; None if the answers are texts."""
    labels = list(dict.fromkeys(answers))
    few = 2 <= len(labels) <= MOST_LABELS and ROWS_PER_LABEL * len(labels) <= len(answers)
    return labels if few and all(0 < len(label) <= LONGEST_LABEL and "\n" not in label for label in labels) else None


def labels_by_task(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The label words of each task that has some."""
    found = {
        task: find_labels([expected_answer(rows[number]) or "" for number in numbers])
        for task, numbers in by_task(rows).items()
    }
    return {task: labels for task, labels in found.items() if labels}


def choose_labels(wanted: str, rows: list[dict[str, Any]], known: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """The labels for each row: those given with `--labels` or, with auto, those of its task in the training data.

    Args:
        known: what `labels_by_task` found in the training data.

    Raises:
        SystemExit: code 2, if there are fewer than two labels, or none are known for a row's task.
    """
    if wanted != "auto":
        labels = tuple(label.strip() for label in re.split("[,，]", wanted))
        if len(labels) < 2 or "" in labels or len(set(labels)) < len(labels):
            fail(f"--labels {wanted}: name two or more different words, with commas between")
        return [labels] * len(rows)
    if not known:
        fail("--labels auto: the adapter names no label words of its training data; name them: --labels 正面,负面")
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
        chosen.append(tuple(known[task]))
    return chosen
