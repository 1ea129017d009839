"""Examples and prompts for people: their text, their tokens, and what is supervised."""

import sys
from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import dim, green, say
from finetuning.preprocessing.encode import IGNORE_INDEX

MOST_SHOWN = 60  # tokens of a part on a terminal; more are left out in its middle
LONGEST_CHARACTER = 4  # bytes of UTF-8, each of which may be a token


def split_parts(labels: list[int]) -> list[tuple[int, int, bool]]:
    """Begin, end, and whether it is supervised, of each run of tokens that are all supervised or all not."""
    parts, start = [], 0
    for supervised, tokens in groupby(labels, lambda label: label != IGNORE_INDEX):
        parts.append((start, start + len(list(tokens)), supervised))
        start = parts[-1][1]
    return parts


def mark_answers(
    input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, show_tokens: bool = False
) -> str:
    """An example in its parts, a line for each: what the model reads, and what it learns to write (green).

    Args:
        show_tokens: whether a line with the tokens and their ids follows each part.
    """
    lines = []
    for start, end, supervised in split_parts(labels):
        text = f"  {'writes' if supervised else 'reads '} {tokenizer.decode(input_ids[start:end])!r}"
        lines.append(green(text) if supervised else text)
        lines += ["         " + shorten(input_ids[start:end], tokenizer)] if show_tokens else []
    return "\n".join(lines)


def list_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Each token's text and id; the tokens that make up one character stand together: `'a' 97  '早' 230,151,169`."""
    shown, start = [], 0
    for end in range(1, len(token_ids) + 1):
        text, is_last = tokenizer.decode(token_ids[start:end]), end == len(token_ids)
        # part of a character is decoded as U+FFFD
        if not is_last and text.endswith("\ufffd") and tokenizer.decode(token_ids[end]).startswith("\ufffd"):
            if end - start < LONGEST_CHARACTER:
                continue
        shown.append(f"{text!r} {dim(','.join(map(str, token_ids[start:end])))}")
        start = end
    return "  ".join(shown)


def shorten(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`list_tokens`, on a terminal without the middle of a long part; a pipe or a file gets all tokens."""
    left_out = len(token_ids) - MOST_SHOWN
    if left_out <= 0 or not sys.stdout.isatty():
        return list_tokens(token_ids, tokenizer)
    ends = (list_tokens(ids, tokenizer) for ids in (token_ids[: MOST_SHOWN // 2], token_ids[-MOST_SHOWN // 2 :]))
    return f"  {dim(f'... {left_out:,} tokens, shown in a pipe: | cat ...')}  ".join(ends)


def print_rows(dataset: Dataset, count: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first examples of `dataset.EXAMPLE` as the model gets them."""
    for example in dataset.select(range(min(count, len(dataset)))):
        counts = f"{example['length']:,} tokens, {example['supervised']:,} of them supervised"
        cut = ", truncated" if example["is_truncated"] else ""
        say(f"\nrow {example['row_number']}: {counts}{cut}")
        say(mark_answers(example["input_ids"], example["labels"], tokenizer, show_tokens=True))
