"""The prompt format: how a conversation becomes tokens, with the same function for training and for inference.

The format is the tokenizer's `chat_template`: the model's own (`chat`), or the one below (`plain`), which is for base
models and reads

    Instruction: 翻译为英文
    Input: 早安
    Output: Good morning<|endoftext|>

The model learns to write everything after 早安.
"""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, first_line

Message = dict[str, Any]  # role, content, and weight 0 if the message is not to be learnt

IGNORE_INDEX = -100  # labels that torch's cross-entropy leaves out

PLAIN_MARK = "{#- prompt format: plain #}"
PLAIN_TEMPLATE = (
    PLAIN_MARK
    + """
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n' }}
{%- elif message.role == 'user' %}{{ 'Instruction: ' + message.content }}
{%- else %}{{ '\\nOutput: ' + message.content + eos_token }}{% endif %}
{%- endfor %}
"""
)
# In front of the template of a thinking model, so that every program that reads the saved template asks as we trained.
NO_THINKING = "{%- set enable_thinking = false %}"
PLAIN_ANSWER = "\nOutput:"  # how a plain answer begins, before its first space

# What Qwen models end on. A base model reloads with <|endoftext|> alone, so generation always gets both (Qwen3#927).
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")

# A Unicode noncharacter (never part of a text). Inside a control token in a user's words, it keeps it from being one.
GUARD = "\ufdd0"


def set_prompt_format(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the chat template of the format `auto`, `chat` or `plain`.

    A base Qwen has not been trained to end a turn with <|im_end|>, and LoRA on its attention cannot teach it
    (Qwen3#1064), so `auto` follows the tokenizer's end token.
    """
    if name == "auto":
        name = "chat" if tokenizer.eos_token == "<|im_end|>" else "plain"
    if name == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif not isinstance(tokenizer.chat_template, str):
        fail("--prompt_format chat: this model's tokenizer has no chat template; use --prompt_format plain")
    elif "enable_thinking" in tokenizer.chat_template and not tokenizer.chat_template.startswith(NO_THINKING):
        tokenizer.chat_template = NO_THINKING + tokenizer.chat_template


def prompt_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the tokenizer's format: 'plain' or 'chat'."""
    return "plain" if tokenizer.chat_template.startswith(PLAIN_MARK) else "chat"


def to_messages(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """A row as a conversation; a row without an output, as in inference, ends with the user's turn."""
    if "messages" in row:
        return row["messages"]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": join_input(row["instruction"], row.get("input") or "", tokenizer)})
    if "output" in row:
        messages.append({"role": "assistant", "content": row["output"]})
    return messages


def join_input(instruction: str, input_text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The content of the user turn for a row's instruction and input."""
    if not input_text:
        return instruction
    return instruction + ("\nInput: " if prompt_format(tokenizer) == "plain" else "\n") + input_text


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer: those of Qwen's two that the vocabulary has, and the tokenizer's own eos."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return sorted({token for token in STOP_TOKENS if token in known} | {tokenizer.eos_token} - {None})


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens(tokenizer)]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up the rows of a batch. Attention and loss leave it out."""
    return stop_token_ids(tokenizer)[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_messages(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Turn a conversation into token ids, and mark what the model should learn to write.

    Each prompt and each answer is tokenised separately, so that no token spans both, and the ids of an inference prompt
    are exactly the first ids of its training row. If a template rewrites earlier turns when a new one begins (Qwen3
    removes the empty thinking block), only the answers after the rewriting are supervised: see `split_turns`.

    Args:
        messages: a conversation. If its last message is the user's, the ids end with the prompt to be answered.

    Returns:
        `input_ids`, and `labels` of the same length: IGNORE_INDEX outside the answers.

    Raises:
        SystemExit: code 2, if the template does not write prompt, answer and stop token one after the other.
    """
    messages = [message | {"content": guard(message["content"], tokenizer)} for message in messages]
    input_ids: list[int] = []
    labels: list[int] = []
    done = ""  # the text whose tokens are in input_ids
    for end, message in enumerate(messages, 1):
        answered = message["role"] == "assistant"
        if not answered and end < len(messages):
            continue
        prompt = render(messages[: end - answered], tokenizer, add_generation_prompt=True)
        if not prompt.startswith(done):
            input_ids, labels, done = [], [], ""
        prompt_ids = tokenize(prompt[len(done) :], tokenizer)
        input_ids += prompt_ids
        labels += [IGNORE_INDEX] * len(prompt_ids)
        if answered:
            done = prompt + cut_answer(render(messages[:end], tokenizer), prompt, tokenizer)
            answer_ids = tokenize(done[len(prompt) :], tokenizer)
            input_ids += answer_ids
            labels += [IGNORE_INDEX] * len(answer_ids) if message.get("weight") == 0 else answer_ids
    return input_ids, labels


def split_turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The training rows that supervise every answer of a row: the row itself or, for a conversation whose earlier turns
    the template rewrites, one row for each answer with the turns before it."""
    messages = to_messages(row, tokenizer)
    ends = [end for end, message in enumerate(messages, 1) if message["role"] == "assistant"]
    if len(ends) > 1:
        first_prompt = render(messages[: ends[0] - 1], tokenizer, add_generation_prompt=True)
        last_prompt = render(messages[: ends[-1] - 1], tokenizer, add_generation_prompt=True)
        if not last_prompt.startswith(first_prompt):
            return [{"messages": messages[:end]} for end in ends]
    return [row]


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """The text of a conversation; with `add_generation_prompt`, up to where the next answer begins.

    transformers runs the template in a sandbox.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # for the templates of older adapters, which do not say so themselves
        )
    except TemplateError as error:  # also what the sandbox refuses
        fail(
            f"the chat template cannot be rendered: {first_line(error)}; fix the template, or use --prompt_format plain"
        )


def cut_answer(text: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows `prompt` in `text`, including its last stop token but not the newline that templates add."""
    answer = text[len(prompt) :]
    stop = max((answer.rfind(token) + len(token) for token in stop_tokens(tokenizer) if token in answer), default=0)
    if not text.startswith(prompt) or not stop:
        fail(
            "the model's chat template does not write a prompt, an answer and a stop token one after the other, so it "
            "cannot be trained on;\nuse --prompt_format plain, or a tokenizer with another chat_template"
        )
    return answer[:stop]


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokenizer's control tokens, such as <|im_start|>."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")


def guard(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Break up the control tokens in a user's words, so that they stay words."""
    return special_tokens(tokenizer).sub(lambda match: match[0][0] + GUARD + match[0][1:], text)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of rendered text. Only control tokens that the template wrote become control tokens."""
    # re.split with a group: words, control token, words, control token, ..., words
    pieces = special_tokens(tokenizer).split(text)
    words = [piece.replace(GUARD, "") for piece in pieces[::2]]
    encoded = tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = encoded[0]
    for control, following in zip(pieces[1::2], encoded[1:], strict=True):
        ids = [*ids, tokenizer.convert_tokens_to_ids(control), *following]
    return ids


def mark_answers(input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A training row for people: what the model reads and what it learns to write, one line for each part."""
    lines = []
    start = 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or (labels[end] == IGNORE_INDEX) != (labels[start] == IGNORE_INDEX):
            name = "reads " if labels[start] == IGNORE_INDEX else "writes"
            lines.append(f"  {name} {tokenizer.decode(input_ids[start:end])!r}")
            start = end
    return "\n".join(lines)


def clean_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A generated answer without the parts that belong to the format."""
    return (text.removeprefix(PLAIN_ANSWER) if prompt_format(tokenizer) == "plain" else text).strip()
