"""Step 4: chat templates, which turn a conversation into text: the prompt format and the thinking mode.

The format is the tokenizer's `chat_template`: the model's own (`chat`), or the one below (`plain`), which is for base
models and reads

    Instruction: 翻译为英文
    Input: 早安
    Output: Good morning<|endoftext|>

The model learns to write everything after 早安.

A thinking Qwen writes its reasoning before the answer, `<think>\\n...\\n</think>\\n\\n`. Its template has two modes:
the prompt either lets reasoning begin, or already holds an empty block. The mode is part of the template, so that every
program that reads the saved template asks as the adapter was trained.
"""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, first_line
from finetuning.preprocessing.files import DataError

# role and content; perhaps reasoning_content; perhaps weight 0 if the message is masked
Message = dict[str, Any]

PLAIN_TEMPLATE = """{#- prompt format: plain #}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n' }}
{%- elif message.role == 'user' %}{{ 'Instruction: ' + message.content }}
{%- else %}{{ '\\nOutput: ' + message.content + eos_token }}{% endif %}
{%- endfor %}
"""
PLAIN_MARK = PLAIN_TEMPLATE.split("\n")[0]
PLAIN_ANSWER = "\nOutput: "  # how a plain answer begins
MERGED_MARK = "{#- merged: as trained #}"  # in the template of a merged checkpoint

# What Qwen models end on. A base model reloads with <|endoftext|> alone, so generation always gets both (Qwen3#927).
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")

OPENING, CLOSING = "<think>\n", "\n</think>\n\n"
THINKING_SWITCH = {True: "{%- set enable_thinking = true %}", False: "{%- set enable_thinking = false %}"}  # in front
# After a template without modes that begins every answer with reasoning, such as that of Qwen3-Thinking-2507.
NO_REASONING = "{%- if add_generation_prompt %}{{- '\\n</think>\\n\\n' }}{%- endif %}"

# Unicode noncharacters, never part of a text. The first stands for an answer while a template is probed; the second is
# inserted into control tokens that occur in users' text, so that they are tokenised as text.
ANSWER, GUARD = "\ufdd1", "\ufdd0"


def set_prompt_format(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the chat template of the format `auto`, `chat` or `plain`, without thinking.

    A base Qwen, whose end token is <|endoftext|>, has not been trained to end a turn with <|im_end|>, and LoRA on its
    attention cannot teach it (Qwen3#1064), so `auto` gives it the plain format, whatever template it brings. The
    template of a merged checkpoint stays as it is.
    """
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if name == "auto" and isinstance(tokenizer.chat_template, str) and MERGED_MARK in tokenizer.chat_template:
        return
    if name == "auto":
        name = "chat" if tokenizer.chat_template and tokenizer.eos_token not in (None, "<|endoftext|>") else "plain"
    if name == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif not isinstance(tokenizer.chat_template, str):
        fail("the model has no chat template; add its chat_template.jinja, or use --prompt_format plain")
    set_thinking(tokenizer, False)


def prompt_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the tokenizer's format: 'plain' or 'chat'."""
    return "plain" if tokenizer.chat_template.startswith(PLAIN_MARK) else "chat"


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that end an answer: those of Qwen's two that the vocabulary has, and the tokenizer's own eos."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return sorted({token for token in STOP_TOKENS if token in known} | {tokenizer.eos_token} - {None})


# ---- thinking


def set_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Put the tokenizer's template into thinking mode or out of it; one that knows no reasoning stays as it is."""
    tokenizer.chat_template = with_thinking(tokenizer, tokenizer.chat_template, thinking)


@lru_cache(maxsize=8)
def with_thinking(tokenizer: PreTrainedTokenizerBase, template: str, thinking: bool) -> str:
    """The template with thinking on or off."""
    template = template.removeprefix(THINKING_SWITCH[True]).removeprefix(THINKING_SWITCH[False])
    template = template.removesuffix(NO_REASONING)
    if "enable_thinking" in template:
        return THINKING_SWITCH[thinking] + template
    return template if thinking or not opens_reasoning(tokenizer, template) else template + NO_REASONING


@lru_cache(maxsize=8)
def opens_reasoning(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the prompts of a template end with the beginning of reasoning."""
    try:
        return render([{"role": "user", "content": "?"}], tokenizer, template, True).endswith(OPENING)
    except DataError as error:
        fail(str(error))


def supports_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template can ask for reasoning, or for none."""
    on, off = (with_thinking(tokenizer, tokenizer.chat_template, thinking) for thinking in (True, False))
    return on != off


def is_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template asks for reasoning before the answer."""
    template = tokenizer.chat_template
    return template.startswith(THINKING_SWITCH[True]) or opens_reasoning(tokenizer, template)


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
        message = f"the chat template cannot be rendered: {first_line(error)}; fix it, or use --prompt_format plain"
        raise DataError(message) from None


def render_answer(before: list[Message], answer: Message, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a prompt, and of its answer with reasoning and stop token.

    An answer with reasoning has the prompt of thinking mode, one without that of the other mode. Both are kept as they
    are, although many templates trim them.
    """
    reasoning = answer.get("reasoning_content", "")
    template = with_thinking(tokenizer, tokenizer.chat_template, bool(reasoning))
    prompt = render(before, tokenizer, template, add_generation_prompt=True)
    lead, stop = probe_template(tokenizer, template)
    if prompt.endswith(OPENING):
        lead = reasoning + CLOSING
    elif reasoning:  # in a format that knows none it is part of the answer
        lead += OPENING + reasoning + CLOSING
    return prompt, lead + answer["content"] + stop


@lru_cache(maxsize=8)
def probe_template(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """The text that a template writes between a prompt and its answer, without reasoning, and the stop text after it.

    Raises:
        DataError: if the template does not write prompt, answer and stop token one after the other.
    """
    question = [{"role": "user", "content": "?"}]
    prompt = render(question, tokenizer, template, add_generation_prompt=True)
    answered = render([*question, {"role": "assistant", "content": ANSWER}], tokenizer, template)
    head, found, tail = answered.rpartition(ANSWER)
    stop = max((tail.rfind(token) + len(token) for token in stop_tokens(tokenizer) if token in tail), default=0)
    has_block = prompt.endswith((OPENING, CLOSING))  # then templates that forget reasoning (QwQ) write another head
    if not found or not stop or not (head.startswith(prompt) or has_block):
        raise DataError(
            "the model's chat template does not write a prompt, an answer and a stop token one after the other, so it "
            "cannot be trained on;\ntrain with --prompt_format plain, or fix the tokenizer's chat_template"
        )
    return "" if has_block else head.removeprefix(prompt).replace(OPENING + CLOSING, ""), tail[:stop]


@lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the control tokens, and of those that `escape` has broken up.

    The rule is that of transformers' `sanitize_control_tokens`: special tokens such as <|im_start|>, and added tokens
    such as <think> that the template itself writes.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    tokens = [token.content for token in added if token.special or token.content in template]
    tokens.sort(key=len, reverse=True)
    broken = [token[0] + GUARD + token[1:] for token in tokens]
    return tuple(re.compile("(" + "|".join(map(re.escape, names)) + ")") for names in (tokens, broken))


def escape(message: Message, tokenizer: PreTrainedTokenizerBase) -> Message:
    """Break up the control tokens in a message's texts, so that they stay text."""
    pattern, _ = control_tokens(tokenizer, tokenizer.chat_template)
    texts = {name: message[name].replace(GUARD, "") for name in ("content", "reasoning_content") if name in message}
    return message | {
        name: pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text) for name, text in texts.items()
    }
