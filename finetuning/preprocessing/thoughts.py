"""The thoughts of a data file: whether they are learnt, and whether the adapter is asked for them."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, say
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import has_modes, is_thinking, set_thinking


def has_thought(row: dict[str, Any]) -> bool:
    return any("reasoning_content" in part for part in (row, *row.get("messages", ())))


def without_thoughts(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the thoughts before its answers."""
    row = {name: value for name, value in row.items() if name != "reasoning_content"}
    if "messages" in row:
        row["messages"] = [without_thoughts(message) for message in row["messages"]]
    return row


def use_of_thoughts(tokenizer: PreTrainedTokenizerBase, wanted: str) -> str:
    """What becomes of the thoughts in the rows, in words.

    Args:
        wanted: `--thinking`: auto, on or off.
    """
    if wanted == "off":
        return "left out"
    return "learnt in thinking mode" if has_modes(tokenizer) else "learnt as a part of it"


def choose_mode(tokenizer: PreTrainedTokenizerBase, summary: Summary, wanted: str) -> None:
    """Put the chat template, which is saved with the adapter, into the mode that most rows are in, or that is wanted.

    Args:
        summary: of the training rows.
        wanted: `--thinking`: auto, on or off.
    """
    if wanted == "on" and not summary.thoughts:
        fail(f"--thinking on: no row of {summary.path} has a thought to learn; leave the flag out")
    set_thinking(tokenizer, wanted == "on" or summary.mostly_thoughts())
    if summary.thoughts and has_modes(tokenizer):
        say(f"the adapter will be asked to answer {'after' if is_thinking(tokenizer) else 'without'} a thought")
