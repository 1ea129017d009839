"""The thoughts of a data file: whether they are learnt, and whether the adapter is asked for them."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, say
from finetuning.preprocessing.rows import Rows
from finetuning.preprocessing.templates import has_modes, is_thinking, set_thinking


def has_thought(row: dict[str, Any]) -> bool:
    return any("reasoning_content" in part for part in (row, *row.get("messages", ())))


def without_thoughts(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the thoughts before its answers."""
    row = {name: value for name, value in row.items() if name != "reasoning_content"}
    if "messages" in row:
        row["messages"] = [without_thoughts(message) for message in row["messages"]]
    return row


def mostly_thoughts(rows: list[dict[str, Any]]) -> bool:
    """Whether more than half of the rows have a thought."""
    return 2 * sum(map(has_thought, rows)) > len(rows)


def keep_or_remove_thoughts(rows: Rows, tokenizer: PreTrainedTokenizerBase, wanted: str) -> None:
    """Print how many rows have a thought, and what becomes of it; `wanted` off removes it.

    Args:
        wanted: `--thinking`: auto, on or off.
    """
    count = sum(map(has_thought, rows))
    if not count:
        return
    use = "learnt in thinking mode" if has_modes(tokenizer) else "learnt as a part of it"
    if wanted == "off":
        use = "left out"
        rows[:] = map(without_thoughts, rows)
    say(f"{rows.path}: {count} rows have a thought before their answer: {use}")


def choose_mode(tokenizer: PreTrainedTokenizerBase, rows: Rows, wanted: str) -> None:
    """Put the chat template, which is saved with the adapter, into the mode that most rows are in, or that is wanted.

    Args:
        wanted: `--thinking`: auto, on or off.
    """
    some = any(map(has_thought, rows))
    if wanted == "on" and not some:
        fail(f"--thinking on: no row of {rows.path} has a thought to learn; leave the flag out")
    set_thinking(tokenizer, wanted == "on" or mostly_thoughts(rows))
    if some and has_modes(tokenizer):
        say(f"the adapter will be asked to answer {'after' if is_thinking(tokenizer) else 'without'} a thought")
