"""From a row to token ids and labels, with the same functions for training and for inference."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from finetuning.preprocessing.templates import (
    GUARD,
    Message,
    guard,
    prompt_format,
    render_answered,
    render_prompt,
    special_tokens,
    stop_tokens,
)

IGNORE_INDEX = -100  # labels that torch's cross-entropy leaves out


def to_messages(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """A row as a conversation; a row without an output, as in inference, ends with the user's turn."""
    if "messages" in row:
        return row["messages"]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    separator = "\nInput: " if prompt_format(tokenizer) == "plain" else "\n"
    content = separator.join([row["instruction"], row["input"]] if row.get("input") else [row["instruction"]])
    messages.append({"role": "user", "content": content})
    if "output" in row:
        thought = {"reasoning_content": row["reasoning_content"]} if row.get("reasoning_content") else {}
        messages.append({"role": "assistant", "content": row["output"]} | thought)
    return messages


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens(tokenizer)]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up the rows of a batch. Attention and loss leave it out."""
    return stop_token_ids(tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_messages(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """`encode_conversations` for one conversation."""
    return encode_conversations([messages], tokenizer)[0]


def encode_conversations(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Turn conversations into token ids, with one call of the tokenizer, and mark what the model should learn to write.

    Each prompt and each answer is tokenised separately, so that no token spans both, and the ids of an inference prompt
    are exactly the first ids of its training row. If a template rewrites earlier turns when a new one begins (Qwen3
    removes the thoughts), only the answers after the rewriting are supervised: see `split_turns`.

    Args:
        conversations: if the last message of one is the user's, its ids end with the prompt to be answered.

    Returns:
        For each conversation `input_ids`, and `labels` of the same length: IGNORE_INDEX outside the answers.

    Raises:
        SystemExit: code 2, if the template does not write prompt, answer and stop token one after the other.
    """
    rendered = [render_parts(messages, tokenizer) for messages in conversations]
    token_ids = iter(tokenize_all([text for parts in rendered for text, _ in parts], tokenizer))
    encoded = []
    for parts in rendered:
        input_ids: list[int] = []
        labels: list[int] = []
        for (_, learnt), ids in zip(parts, token_ids):  # noqa: B905 - the ids go on with the next conversation
            input_ids += ids
            labels += ids if learnt else [IGNORE_INDEX] * len(ids)
        encoded.append((input_ids, labels))
    return encoded


def render_parts(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a conversation in parts, prompts and answers in turn, each with whether it is to be learnt."""
    messages = [guard_message(message, tokenizer) for message in messages]
    parts: list[tuple[str, bool]] = []
    done = ""  # the text of the parts
    for end, message in enumerate(messages, 1):
        answer = ""
        if message["role"] == "assistant":
            prompt, answer = render_answered(messages[:end], tokenizer)
        elif end == len(messages):
            prompt = render_prompt(messages, tokenizer)
        else:
            continue
        if not prompt.startswith(done):
            parts, done = [], ""
        parts += [(prompt[len(done) :], False), (answer, message.get("weight") != 0)]
        done = prompt + answer
    return parts


def guard_message(message: Message, tokenizer: PreTrainedTokenizerBase) -> Message:
    return message | {
        name: guard(message[name], tokenizer) for name in ("content", "reasoning_content") if name in message
    }


def split_turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The training rows that supervise every answer of a row: the row itself or, for a conversation whose earlier turns
    the template rewrites, one row for each answer with the turns before it."""
    messages = to_messages(row, tokenizer)
    ends = [end for end, message in enumerate(messages, 1) if message["role"] == "assistant"]
    done = ""
    for end in ends if len(ends) > 1 else ():
        prompt, answer = render_answered(messages[:end], tokenizer)
        if not prompt.startswith(done):
            return [{"messages": messages[:end]} for end in ends]
        done = prompt + answer
    return [row]


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of rendered text. Only control tokens that the template wrote become control tokens."""
    return tokenize_all([text], tokenizer)[0]


def tokenize_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """`tokenize` for many texts, with one call of the tokenizer for all words in them."""
    # re.split with a group: words, control token, words, control token, ..., words
    pieces = [special_tokens(tokenizer).split(text) for text in texts]
    words = list({words: None for piece in pieces for words in piece[::2]})  # templates repeat theirs
    plain = [text.replace(GUARD, "") for text in words]
    encoded = tokenizer(plain, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    ids_of_words = dict(zip(words, encoded.input_ids, strict=True))
    token_ids = []
    for first, *others in pieces:
        ids = list(ids_of_words[first])
        for control, following in zip(others[::2], others[1::2], strict=True):
            ids += [tokenizer.convert_tokens_to_ids(control), *ids_of_words[following]]
        token_ids.append(ids)
    return token_ids
