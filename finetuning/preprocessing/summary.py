"""What a run needs to know of a data file beside its tokens, counted while the rows pass by."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from finetuning.cli.console import fact, fail, say
from finetuning.preprocessing.label_words import AnswerCounts
from finetuning.preprocessing.rows import NO_TASK, expected_answer, print_unread


@dataclass
class Summary:
    """Counts of the rows of a data file."""

    path: str = ""
    sha256: str = ""  # of the files' bytes
    rows: int = 0
    whole: int = 0
    cut: int = 0
    dropped: int = 0
    examples: int = 0  # to train on; more than rows if conversations were split
    tokens: int = 0  # of the examples
    learnt: int = 0  # of these tokens
    thoughts: int = 0  # rows with a thought that is learnt
    thoughts_left_out: int = 0
    empty: int = 0  # answers
    unread: Counter[str] = field(default_factory=Counter)  # rows that have a field which means nothing here, by name
    renamed: Counter[str] = field(default_factory=Counter)  # rows that have a field which a flag names, by name
    tasks: dict[str, AnswerCounts] = field(default_factory=dict)

    def add_row(self, row: dict[str, Any]) -> None:
        """Count a row in the form of `schema.read_row`."""
        self.rows += 1
        self.empty += row.get("output") == ""
        answers = self.tasks.setdefault(str(row.get("task", NO_TASK)), AnswerCounts())
        answers.add(expected_answer(row) or "")

    def add(self, other: "Summary") -> None:
        """Add the counts of the rows that follow."""
        for name, value in vars(other).items():
            if isinstance(value, int | Counter):
                setattr(self, name, getattr(self, name) + value)
        for task, answers in other.tasks.items():
            self.tasks.setdefault(task, AnswerCounts()).merge(answers)

    def labels(self) -> dict[str, list[str]]:
        """The label words of each task that has some."""
        found = {task: answers.labels() for task, answers in self.tasks.items()}
        return {task: labels for task, labels in found.items() if labels}

    def mostly_thoughts(self) -> bool:
        """Whether more than half of the rows have a thought to learn."""
        return 2 * self.thoughts > self.rows

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"tasks": {task: vars(answers) for task, answers in self.tasks.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Summary":
        tasks = {task: AnswerCounts(**answers) for task, answers in values["tasks"].items()}
        return cls(**values | {name: Counter(values[name]) for name in ("unread", "renamed")} | {"tasks": tasks})


def print_summary(summary: Summary, max_length: int, learnt_as: str) -> None:
    """Print how many rows were kept, cut and dropped, how many have a thought or an empty answer, and what is not read.

    Args:
        learnt_as: what becomes of the thoughts.

    Raises:
        SystemExit: code 2, if no example is left.
    """
    path = summary.path
    print_unread(path, summary.unread)
    thoughts = summary.thoughts or summary.thoughts_left_out
    if thoughts:
        say(f"{path}: {thoughts:,} rows have a thought before their answer: {learnt_as}")
    more = f" ({summary.examples:,} examples)" if summary.examples > summary.rows else ""
    kept = f": {summary.whole:,} kept whole, {summary.cut:,} cut at {max_length} tokens, {summary.dropped:,} dropped"
    kept += " (no part of their answer was left)" if summary.dropped else ""
    fact("rows", f"{path}: {summary.rows:,} rows{more}{', all kept whole' if summary.whole == summary.rows else kept}")
    if summary.examples:
        fact("tokens", f"{summary.tokens:,}, of which {summary.learnt / summary.tokens:.0%} are learnt")
    if summary.empty:
        say(f"{path}: {summary.empty:,} rows have an empty answer: the model learns to say nothing there")
    if not summary.examples:
        fail(f"{path}: no row is left; raise --max_length (now {max_length})")
