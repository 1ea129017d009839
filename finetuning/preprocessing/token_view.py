"""Rows and prompts for people: their text, their tokens, and what is learnt."""

import sys
from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import dim, green, say
from finetuning.preprocessing.prompts import IGNORE_INDEX, stop_token_ids

MOST_SHOWN = 60  # tokens of a part on a terminal; more are left out in its middle
LONGEST_CHARACTER = 4  # bytes of UTF-8, each of which may be a token


def split_parts(labels: list[int]) -> list[tuple[int, int, bool]]:
    """Begin, end, and whether it is learnt, of each run of tokens that are all learnt or all not."""
    parts, start = [], 0
    for learnt, tokens in groupby(labels, lambda label: label != IGNORE_INDEX):
        end = start + len(list(tokens))
        parts.append((start, end, learnt))
        start = end
    return parts


def mark_answers(input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A training row: what the model reads and what it learns to write, one line for each part."""
    parts = split_parts(labels)
    lines = [(f"  {verb(learnt)}    {tokenizer.decode(input_ids[a:b])!r}", learnt) for a, b, learnt in parts]
    return "\n".join(green(line) if learnt else line for line, learnt in lines)


def verb(learnt: bool) -> str:
    return "writes" if learnt else "reads "


def list_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Each token's text and id; the tokens that make up one character stand together: `'a' 97  '早' 230,151,169`."""
    shown = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end])
        # part of a character is decoded as U+FFFD
        if end < len(token_ids) and text.endswith("\ufffd") and end - start < LONGEST_CHARACTER:
            if tokenizer.decode(token_ids[end]).startswith("\ufffd"):
                continue
        shown.append(f"{text!r} {dim(','.join(map(str, token_ids[start:end])))}")
        start = end
    return "  ".join(shown)


def shorten(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`list_tokens`, on a terminal without the middle of a long part; a pipe or a file gets all tokens."""
    left_out = len(token_ids) - MOST_SHOWN
    if left_out <= 0 or not sys.stdout.isatty():
        return list_tokens(token_ids, tokenizer)
    head, tail = token_ids[: MOST_SHOWN // 2], token_ids[-MOST_SHOWN // 2 :]
    middle = dim(f"... {left_out:,} tokens, shown in a pipe: | cat ...")
    return f"{list_tokens(head, tokenizer)}  {middle}  {list_tokens(tail, tokenizer)}"


def print_rows(dataset: Dataset, count: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first rows as the model gets them: the text of each part, its tokens and their ids.

    What is learnt is marked by the word `writes` and, on a terminal, by its colour.

    Args:
        dataset: from `make_dataset`.
    """
    for example in dataset.select(range(min(count, len(dataset)))):
        input_ids, parts = example["input_ids"], split_parts(example["labels"])
        learnt = sum(end - start for start, end, is_learnt in parts if is_learnt)
        cut = "" if input_ids[-1] in stop_token_ids(tokenizer) else ", cut: it has no stop token at its end"
        say(f"\nrow {example['row_number']}: {len(input_ids):,} tokens, {learnt:,} of them learnt{cut}")
        for start, end, is_learnt in parts:
            text = f"  {verb(is_learnt)} {tokenizer.decode(input_ids[start:end])!r}"
            say(green(text) if is_learnt else text)
            say(f"         {shorten(input_ids[start:end], tokenizer)}")


def print_prompt(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a prompt's exact text and its ids on stderr, so that stdout gets the answer alone."""
    print(f"prompt, {len(token_ids):,} tokens: {tokenizer.decode(token_ids)!r}\nids: {token_ids}", file=sys.stderr)
