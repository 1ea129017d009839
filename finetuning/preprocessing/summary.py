"""What is printed of a data file once its rows are tokens."""

from collections import Counter

from finetuning.cli.console import fail, say
from finetuning.preprocessing.rows import Rows


def print_summary(rows: Rows, counts: Counter[str], examples: int, max_length: int) -> None:
    """Print how many rows were kept, cut and dropped, and how many have an empty answer.

    Args:
        counts: of `whole`, `cut` and `dropped` rows.
        examples: to train on; more than rows if conversations were split.

    Raises:
        SystemExit: code 2, if no example is left.
    """
    more = f" ({examples:,} examples)" if examples > len(rows) else ""
    say(
        f"{rows.path}: {len(rows)} rows{more}: {counts['whole']} kept whole, {counts['cut']} cut at {max_length} "
        f"tokens, {counts['dropped']} dropped (no part of their answer was left)"
    )
    empty = sum(row.get("output") == "" for row in rows)
    if empty:
        say(f"{rows.path}: {empty} rows have an empty answer: the model learns to say nothing there")
    if not examples:
        fail(f"{rows.path}: no row is left; raise --max_length (now {max_length})")
