"""Chat templates: the prompt format, thinking mode, and how a conversation becomes text.

The format is the tokenizer's `chat_template`: the model's own (`chat`), or the one below (`plain`), which is for base
models and reads

    Instruction: 翻译为英文
    Input: 早安
    Output: Good morning<|endoftext|>

The model learns to write everything after 早安.

A thinking Qwen writes a thought before its answer, `<think>\\n...\\n</think>\\n\\n`. Its template has two modes: the
prompt either lets a thought begin, or already holds an empty one. The mode is part of the template, so that every
program that reads the saved template asks as the adapter was trained.
"""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, first_line

# role and content; perhaps reasoning_content, the thought; perhaps weight 0 if the message is not to be learnt
Message = dict[str, Any]

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
PLAIN_ANSWER = "\nOutput: "  # how a plain answer begins
MERGED_MARK = "{#- merged: as trained #}"  # in the template of a merged checkpoint

# What Qwen models end on. A base model reloads with <|endoftext|> alone, so generation always gets both (Qwen3#927).
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")

OPENING, CLOSING = "<think>\n", "\n</think>\n\n"
# In front of the template of a thinking model.
MODES = {True: "{%- set enable_thinking = true %}", False: "{%- set enable_thinking = false %}"}
# Behind a template that knows no modes and begins every answer with a thought, such as that of Qwen3-Thinking-2507.
NO_THOUGHT = "{%- if add_generation_prompt %}{{- '\\n</think>\\n\\n' }}{%- endif %}"

# Unicode noncharacters, never part of a text. The first stands for an answer while a template is rendered; the second,
# inside a control token in a user's words, keeps it from being one.
ANSWER, GUARD = "\ufdd1", "\ufdd0"


def set_prompt_format(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the chat template of the format `auto`, `chat` or `plain`, without thinking.

    A base Qwen has not been trained to end a turn with <|im_end|>, and LoRA on its attention cannot teach it
    (Qwen3#1064), so `auto` follows the tokenizer's end token. The template of a merged checkpoint stays as it is.
    """
    if name == "auto" and isinstance(tokenizer.chat_template, str) and MERGED_MARK in tokenizer.chat_template:
        return
    if name == "auto":
        name = "chat" if tokenizer.eos_token == "<|im_end|>" else "plain"
    if name == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif not isinstance(tokenizer.chat_template, str):
        fail("the model has no chat template; add its chat_template.jinja, or train with --prompt_format plain")
    set_thinking(tokenizer, False)


def prompt_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the tokenizer's format: 'plain' or 'chat'."""
    return "plain" if tokenizer.chat_template.startswith(PLAIN_MARK) else "chat"


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer: those of Qwen's two that the vocabulary has, and the tokenizer's own eos."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return sorted({token for token in STOP_TOKENS if token in known} | {tokenizer.eos_token} - {None})


# ---- thinking


def split_thought(text: str) -> tuple[str, str]:
    """The thought at the beginning of a text and the answer after it. A thought that does not end is all there is."""
    if not text.lstrip().startswith("<think>"):
        return "", text
    thought, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    return thought.strip(), answer.lstrip("\n")


def set_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Put the tokenizer's template into thinking mode or out of it; one that knows no thoughts stays as it is."""
    tokenizer.chat_template = in_mode(tokenizer, tokenizer.chat_template, thinking)


@lru_cache(maxsize=8)
def in_mode(tokenizer: PreTrainedTokenizerBase, template: str, thinking: bool) -> str:
    """The template with thinking on or off."""
    template = template.removeprefix(MODES[True]).removeprefix(MODES[False]).removesuffix(NO_THOUGHT)
    if "enable_thinking" in template:
        return MODES[thinking] + template
    return template if thinking or not opens_thought(tokenizer, template) else template + NO_THOUGHT


@lru_cache(maxsize=8)
def opens_thought(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the prompts of a template end with the beginning of a thought."""
    return render([{"role": "user", "content": "?"}], tokenizer, template, True).endswith(OPENING)


def has_modes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template can ask for a thought, or for none."""
    template = tokenizer.chat_template
    return in_mode(tokenizer, template, True) != in_mode(tokenizer, template, False)


def is_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template asks for a thought before the answer."""
    template = tokenizer.chat_template
    return template.startswith(MODES[True]) or opens_thought(tokenizer, template)


# ---- text


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation; with `add_generation_prompt`, up to where the next answer begins.

    transformers runs the template in a sandbox.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # for the templates of older adapters, which do not say so themselves
        )
    except TemplateError as error:  # also what the sandbox refuses
        fail(f"the chat template cannot be rendered: {first_line(error)}; fix it, or train with --prompt_format plain")


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a conversation that ends with the user's turn, up to where the answer begins."""
    return render(messages, tokenizer, tokenizer.chat_template, add_generation_prompt=True)


def render_answered(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The texts of a conversation that ends with an answer: its prompt, and the answer with its thought and stop token.

    An answer with a thought has the prompt of thinking mode, one without that of the other mode. Thought and answer are
    kept as they are, although many templates trim them.

    Raises:
        SystemExit: code 2, if the template does not write prompt, answer and stop token one after the other.
    """
    *before, last = messages
    thought = last.get("reasoning_content", "")
    template = in_mode(tokenizer, tokenizer.chat_template, bool(thought))
    prompt = render(before, tokenizer, template, add_generation_prompt=True)
    head, place, tail = render([*before, last | {"content": ANSWER}], tokenizer, template).rpartition(ANSWER)
    stop = max((tail.rfind(token) + len(token) for token in stop_tokens(tokenizer) if token in tail), default=0)
    if not place or not stop or not (head.startswith(prompt) or prompt.endswith((OPENING, CLOSING))):
        fail(
            "the model's chat template does not write a prompt, an answer and a stop token one after the other, so it "
            "cannot be trained on;\ntrain with --prompt_format plain, or fix the tokenizer's chat_template"
        )
    return prompt, thought_and_more(prompt, head, thought) + last["content"] + tail[:stop]


def thought_and_more(prompt: str, head: str, thought: str) -> str:
    """What the model writes between the prompt and the answer: its thought, and what the format puts there.

    Args:
        head: what the template writes before the answer, prompt included.
        thought: "" for none; an empty thought belongs to the prompt, if anywhere.
    """
    if prompt.endswith(OPENING):  # also if the template forgets the thoughts of answers (QwQ)
        return thought + CLOSING
    words = "" if prompt.endswith(CLOSING) else head.removeprefix(prompt).replace(OPENING + CLOSING, "")
    if not thought or OPENING + thought in words:
        return words
    return words + OPENING + thought + CLOSING  # in a format that knows no thoughts it is part of the answer


def read_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The thought and the answer in a generated text, without the parts that belong to the format."""
    if prompt_format(tokenizer) == "plain":
        text = text.removeprefix(PLAIN_ANSWER.rstrip()).removeprefix(" ")
    elif opens_thought(tokenizer, tokenizer.chat_template):
        text = OPENING + text
    return split_thought(text)


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokenizer's control tokens, such as <|im_start|>."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")


def guard(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Break up the control tokens in a user's words, so that they stay words."""
    return special_tokens(tokenizer).sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
