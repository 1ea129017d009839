"""What a run needs to know of its data beside the tokens: counts, label words, whether most rows have reasoning."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fact, say
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.rows import print_ignored
from finetuning.preprocessing.templates import supports_thinking_switch

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
    masked: int = 0  # rows without a supervised answer
    examples: int = 0  # to train on; more than rows if conversations were split
    tokens: int = 0  # of the examples
    supervised: int = 0  # of these tokens
    reasoning: int = 0  # rows with reasoning that is supervised; of dropped rows nothing is
    reasoning_left_out: int = 0  # rows with reasoning that is not
    empty: int = 0  # rows with an empty or blank answer
    ignored: dict[str, int] = field(default_factory=dict)  # rows that have a field which means nothing here, by name
    answers: list[dict[str, Any]] = field(default_factory=list)  # `label` of a `task`, its `count` and `first` row

    def mostly_reasoning(self) -> bool:
        return 2 * self.reasoning > self.kept + self.truncated


def summarize(examples: Dataset, path: str, sha256: str, drop_reasoning: bool) -> Summary:
    """Count rows and tokens of examples with the columns of `dataset.TABLE`."""
    table = examples.remove_columns(["input_ids", "labels", "row"]).with_format("arrow")[:]
    is_left = pc.greater(table["length"], 0)
    rows = table.filter(pc.is_valid(table["task"]))  # the first example of each
    left = rows.filter(pc.greater(rows["length"], 0))
    cut, truncated = (pc.sum(part["is_cut"]).as_py() or 0 for part in (rows, left))
    masked = len(rows) - cut - (len(left) - truncated)  # neither cut nor left
    summary = Summary(path, sha256, len(rows), len(left) - truncated, truncated, cut - truncated, masked)
    summary.examples, summary.tokens, summary.supervised, summary.reasoning, summary.empty = (
        pc.sum(column).as_py() or 0
        for column in (is_left, table["length"], table["supervised"], left["has_reasoning"], rows["is_empty"])
    )
    if drop_reasoning:
        summary.reasoning, summary.reasoning_left_out = 0, summary.reasoning
    ignored = Counter[str]()
    for names in pc.value_counts(rows["ignored"]):
        ignored.update(dict.fromkeys(json.loads(names["values"].as_py()), names["counts"].as_py()))
    summary.ignored = dict(ignored)
    groups = rows.group_by(["task", "label"], use_threads=False).aggregate([([], "count_all"), ("row_number", "min")])
    groups = groups.rename_columns(["task", "label", "count", "first"])
    sizes = groups.group_by("task").aggregate([("label", "count")])
    few = sizes.filter(pc.is_in(sizes["label_count"], pa.array(range(2, MOST_ANSWERS), pa.int64())))["task"]
    summary.answers = groups.filter(pc.is_in(groups["task"], few)).to_pylist()
    return summary


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
    counts = f": {summary.kept:,} kept, {summary.truncated:,} truncated at {max_length} tokens, "
    counts += f"{summary.dropped:,} dropped" + " (nothing of their answers was left)" * bool(summary.dropped)
    fact("rows", f"{path}: {summary.rows:,} rows{more}{', all kept' if summary.kept == summary.rows else counts}")
    if summary.masked:
        say(f"{path}: {summary.masked:,} rows have no answer to learn: all of theirs have weight 0")
    if not summary.examples:
        remedy = f"; raise --max_length (now {max_length})" if summary.dropped else ""
        raise DataError(f"{path}: no row is left{remedy}")
    fact("tokens", f"{summary.tokens:,}, of which {summary.supervised / summary.tokens:.0%} are supervised")
    if summary.empty:
        say(f"{path}: {summary.empty:,} rows have an empty answer: the model learns to say nothing there")
