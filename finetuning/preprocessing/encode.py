"""Step 5: from a conversation to token ids and labels, with the same functions for training and for inference."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from finetuning.preprocessing.rows import Row
from finetuning.preprocessing.templates import (
    GUARD,
    Message,
    control_tokens,
    escape,
    prompt_format,
    render,
    render_answer,
    stop_tokens,
)

IGNORE_INDEX = -100  # labels that torch's cross-entropy leaves out


class Example(Mapping[str, list[int]]):
    """`input_ids` and, of the same length, `labels`: the ids of what the model learns to write, elsewhere IGNORE_INDEX.

    It is made of pieces of text, each with whether it is supervised. They are tokenised one by one, so that no token
    spans two, when a column is first read, or together with others by `encode_together`.
    """

    def __init__(self, pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.pieces, self.tokenizer, self.columns = pieces, tokenizer, {}

    def __getitem__(self, name: str) -> list[int]:
        if not self.columns:
            encode_together([self])
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "labels"))

    def __len__(self) -> int:
        return 2


def to_messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """A normalized row as a conversation; a row without an output, as in inference, ends with the user's turn."""
    if "messages" in row:
        return row["messages"]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    separator = "\nInput: " if prompt_format(tokenizer) == "plain" else "\n"
    content = separator.join([row["instruction"], row["input"]] if row.get("input") else [row["instruction"]])
    messages.append({"role": "user", "content": content})
    if "output" in row:
        reasoning = {"reasoning_content": row["reasoning_content"]} if row.get("reasoning_content") else {}
        messages.append({"role": "assistant", "content": row["output"]} | reasoning)
    return messages


def encode(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Turn a conversation into token ids, and mark what the model should learn to write.

    An example grows answer by answer. A new one begins only if the template rewrites what came before the next answer,
    as Qwen3's removes earlier reasoning. Each answer is supervised exactly once, after the prompt that inference gives:
    if the last message is the user's, the last example ends with the prompt to be answered. What is supervised are the
    answers with their stop tokens.

    Raises:
        DataError: if the template does not write prompt, answer and stop token one after the other.
    """
    messages = [escape(message, tokenizer) for message in messages]
    examples: list[list[tuple[str, bool]]] = []  # texts, each with whether it is supervised
    text = None  # of the current example
    for end, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answer = render_answer(messages[:end], message, tokenizer)
        elif end == len(messages) - 1:
            prompt, answer = render(messages, tokenizer, tokenizer.chat_template, add_generation_prompt=True), ""
        else:
            continue
        if text is None or not prompt.startswith(text):
            examples.append([])
            text = ""
        examples[-1] += [(prompt[len(text) :], False), (answer, message.get("weight") != 0)]
        text = prompt + answer
    return [Example(pieces, tokenizer) for pieces in examples]


def encode_together(examples: list[Example]) -> None:
    """Tokenise the examples of many rows in one call, which is faster than one by one."""
    examples = [example for example in examples if isinstance(example, Example)]
    texts = [text for example in examples for text, _ in example.pieces]
    token_ids = iter(tokenize(texts, examples[0].tokenizer) if texts else ())
    for example in examples:
        input_ids, labels = [], []
        for _, supervised in example.pieces:
            ids = next(token_ids)
            input_ids += ids
            labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        example.columns = {"input_ids": input_ids, "labels": labels}


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of rendered texts, each alone. Only control tokens that the template wrote become control tokens."""
    _, broken = control_tokens(tokenizer, tokenizer.chat_template)
    # split with a group: text, broken token, text, ..., broken token, text
    pieces = [broken.split(text) if GUARD in text else [text] for text in texts]
    rendered = [piece for each in pieces for piece in each[::2]]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(rendered, add_special_tokens=False))
    token_ids = []
    for each in pieces:
        token_ids.append(next(encoded).ids)
        for token in each[1::2]:
            token_ids[-1] += [*text_tokenizer(tokenizer).encode(token.replace(GUARD, "")).ids, *next(encoded).ids]
    return token_ids


@lru_cache(maxsize=4)
def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer without its added tokens: everything is text to it."""
    backend = tokenizer.backend_tokenizer
    plain = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    return plain


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens(tokenizer)]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up the rows of a batch. Attention and loss leave it out."""
    return stop_token_ids(tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
