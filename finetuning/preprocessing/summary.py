"""What a run needs to know of its data beside the tokens: counts, label words, whether most rows have reasoning."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fact, say
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.rows import print_ignored
from finetuning.preprocessing.templates import supports_thinking_switch

LONGEST_LABEL = 40  # characters
MOST_ANSWERS = 10_000  # different answers of a task that are counted; more of them are texts


@dataclass
class Summary:
    """Counts of the rows of data files."""

    path: str = ""
    sha256: str = ""  # of the files' bytes
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    examples: int = 0  # to train on; more than rows if conversations were split
    tokens: int = 0  # of the examples
    supervised: int = 0  # of these tokens
    reasoning: int = 0  # rows with reasoning that is learnt
    reasoning_left_out: int = 0  # rows with reasoning that is not
    empty: int = 0  # rows with an empty or blank answer
    ignored: dict[str, int] = field(default_factory=dict)  # rows that have a field which means nothing here, by name
    answers: list[dict[str, Any]] = field(default_factory=list)  # `label` of a `task`, its `count` and `first` row

    def mostly_reasoning(self) -> bool:
        return 2 * self.reasoning > self.rows


def summarize(rows: Dataset, tokens: Dataset, path: str, sha256: str, drop_reasoning: bool) -> Summary:
    """Count rows and tokens.

    Args:
        rows, tokens: with the columns of `dataset.ROWS` and `dataset.TOKENS`.
    """
    table = rows.remove_columns(["location", "row"]).with_format("arrow")[:]
    counts = tokens.remove_columns(["input_ids", "labels"]).with_format("arrow")[:]
    _, first = np.unique(counts["row_number"].to_numpy(), return_index=True)  # example of each row that is left
    truncated = int(counts["is_truncated"].to_numpy()[first].sum())
    ignored = Counter[str]()
    for names in pc.value_counts(table["ignored"]):
        ignored.update(dict.fromkeys(json.loads(names["values"].as_py()), names["counts"].as_py()))
    summary = Summary(path, sha256, len(rows), len(first) - truncated, truncated, len(rows) - len(first), len(tokens))
    summary.tokens, summary.supervised = (pc.sum(counts[name]).as_py() or 0 for name in ("length", "supervised"))
    summary.reasoning, summary.empty = (pc.sum(table[name]).as_py() for name in ("has_reasoning", "is_empty"))
    if drop_reasoning:
        summary.reasoning, summary.reasoning_left_out = 0, summary.reasoning
    summary.ignored = dict(ignored)
    table = table.append_column("number", pa.array(np.arange(1, len(rows) + 1)))
    groups = table.group_by(["task", "label"], use_threads=False).aggregate([([], "count_all"), ("number", "min")])
    groups = groups.rename_columns(["task", "label", "count", "first"])
    sizes = groups.group_by("task").aggregate([("label", "count")])
    few = sizes.filter(pc.is_in(sizes["label_count"], pa.array(range(2, MOST_ANSWERS), pa.int64())))["task"]
    summary.answers = groups.filter(pc.is_in(groups["task"], few)).to_pylist()
    return summary


def as_label(answer: str | None) -> str | None:
    """An answer that may be a label word; None for one that is empty, long or has several lines."""
    return answer if answer and len(answer) <= LONGEST_LABEL and "\n" not in answer else None


def print_summary(summary: Summary, max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print how many rows were kept, truncated and dropped, have reasoning or an empty answer, and what is ignored.

    Raises:
        DataError: if no example is left.
    """
    path = summary.path
    print_ignored(path, summary.ignored)
    reasoning = summary.reasoning or summary.reasoning_left_out
    if reasoning:
        use = "trained in thinking mode" if supports_thinking_switch(tokenizer) else "trained as a part of it"
        use = use if summary.reasoning else "left out"
        say(f"{path}: {reasoning:,} rows have reasoning before their answer: {use}")
    more = f" ({summary.examples:,} examples)" if summary.examples > summary.rows else ""
    counts = (
        f": {summary.kept:,} kept, {summary.truncated:,} truncated at {max_length} tokens, {summary.dropped:,} dropped"
    )
    counts += " (nothing of their answers was left)" if summary.dropped else ""
    fact("rows", f"{path}: {summary.rows:,} rows{more}{', all kept' if summary.kept == summary.rows else counts}")
    if not summary.examples:
        raise DataError(f"{path}: no row is left; raise --max_length (now {max_length})")
    fact("tokens", f"{summary.tokens:,}, of which {summary.supervised / summary.tokens:.0%} are supervised")
    if summary.empty:
        say(f"{path}: {summary.empty:,} rows have an empty answer: the model learns to say nothing there")
