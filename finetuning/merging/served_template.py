"""The chat template of a merged checkpoint: the trained one, as any program that serves it can use it.

A tuned prompt stands in front of every conversation, as special tokens whose embeddings are its vectors. The user's
words are kept from naming these tokens. For Ollama, whose templates are written in Go's language, the template is taken
apart into what it writes before and after each message.
"""

import json
import re
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from finetuning.preprocessing.encode import encode, tokenize
from finetuning.preprocessing.templates import (
    MERGED_MARK,
    NO_REASONING,
    PLAIN_ANSWER,
    PLAIN_MARK,
    STOP_TOKENS,
    THINKING_SWITCH,
    Message,
    prompt_format,
    render,
    stop_tokens,
)

SOFT_TOKEN = "<|soft_prompt_"
# A program that reads a template's output cannot tell the user's words from the template's.
NO_SOFT_TOKEN = "{%- filter replace('" + SOFT_TOKEN + "', '<| soft_prompt_') %}"
PLAIN_START = PLAIN_ANSWER.rstrip()  # without the space, which is part of the answer's first token
# How transformers' own server reads a plain answer. It would look for ChatML in it, and show the prompt too.
PLAIN_RESPONSE = {
    "defaults": {"role": "assistant", "content": ""},  # an empty answer has no field
    "start_anchor_pattern": r"\Z",  # nothing of an answer stands in its prompt
    "fields": {
        "content": {
            "open_pattern": rf"^(?:{PLAIN_START})? ?",
            "close_pattern": "|".join(map(re.escape, STOP_TOKENS)),
            "content": "text",
        }
    },
}
# What a question may end with. Some tokenizers join such an end and the line break after it into one token.
ENDS = ("", " ", "\n", ".", "?", "!", ":", ")", '"', "。", "？", "！", "：", "”")


def soft_tokens(count: int) -> list[str]:
    """The names of the tokens that stand for the vectors of a soft prompt."""
    return [f"{SOFT_TOKEN}{number}|>" for number in range(count)]


def serve_template(template: str, tokens: list[str], plain_start: str = "") -> str:
    """The template of a merged checkpoint, from the one beside its adapter.

    Args:
        tokens: those of a soft prompt, which every conversation begins with.
        plain_start: what a prompt in the plain format ends with, from `choose_plain_start`.
    """
    head = next((mark for mark in (*THINKING_SWITCH.values(), PLAIN_MARK) if template.startswith(mark)), "")
    tail = NO_REASONING if template.endswith(NO_REASONING) else ""
    body = template.removeprefix(head).removesuffix(tail).removeprefix(MERGED_MARK)
    if plain_start:
        tail += "{%- if add_generation_prompt %}{{- " + json.dumps(plain_start) + " }}{%- endif %}"
    if tokens:
        body = "{{- '" + "".join(tokens) + "' }}" + NO_SOFT_TOKEN + body.removesuffix("\n") + "{% endfilter %}"
    return head + MERGED_MARK + body + tail


def choose_plain_start(
    tokenizer: PreTrainedTokenizerBase, questions: list[list[Message]], answers: list[list[int]]
) -> str:
    r"""What a prompt in the plain format may end with, so that a chat shows only what comes after it: `\nOutput:`.

    Prompts and answers are tokenised separately in training, but together in other programs. If that gives other tokens
    for any of the questions, with any of the usual ends, the prompt must end before it; so it must if an answer
    begins otherwise.

    Returns:
        An empty string if nothing may be added, or the format is not the plain one.
    """
    if prompt_format(tokenizer) != "plain":
        return ""
    (start,) = tokenize([PLAIN_START], tokenizer)
    if any(answer[: len(start)] != start for answer in answers):
        return ""
    for *before, last in questions:
        for end in ENDS:
            messages = [*before, last | {"content": last["content"] + end}]
            prompt = render(messages, tokenizer, tokenizer.chat_template, add_generation_prompt=True)
            (together,) = tokenize([prompt + PLAIN_START], tokenizer)
            if prompt.endswith(PLAIN_START) or together != encode(messages, tokenizer)[-1]["input_ids"] + start:
                return ""
    return PLAIN_START


# ---- Ollama


def write_modelfile(tokenizer: PreTrainedTokenizerBase, weights: str, greedy: bool) -> str | None:
    """The Modelfile with which Ollama serves a merged checkpoint; None if the template has rules beyond Go's template.

    Args:
        tokenizer: of the merged checkpoint.
        weights: name of the GGUF file beside the Modelfile.
        greedy: whether answers are greedy.
    """
    pieces = take_apart(tokenizer)
    if pieces is None:
        return None
    words = {name: text and "{{ " + json.dumps(text, ensure_ascii=False) + " }}" for name, text in pieces.items()}
    template = "{{- if not .System }}" + words["no system"] + "{{ end }}\n{{- range .Messages }}\n"
    for condition, role in (("if", "system"), ("else if", "user"), ("else if", "assistant")):
        message = words[f"before {role}"] + "{{ .Content }}" + words[f"after {role}"]
        template += f'{{{{- {condition} eq .Role "{role}" }}}}{message}\n'
    template += "{{- end }}\n{{- end }}" + words["end"]
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {token}" for token in stop_tokens(tokenizer)]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"] if greedy else []
    return "\n".join(lines) + "\n"


def take_apart(tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """What the tokenizer's template writes before, between and after messages; None if that depends on more than their
    roles, or if it trims them: Go's template would not."""
    spaced = [{"role": role, "content": f" {role} "} for role in ("system", "user", "assistant", "user")]
    text = render(spaced, tokenizer, tokenizer.chat_template)
    if not all(message["content"] in text for message in spaced):
        return None

    def parts(*roles: str) -> list[str]:
        """The text of a conversation between its messages."""
        names = [f"\ue000{number}\ue001" for number in range(len(roles))]
        messages = [{"role": role, "content": name} for role, name in zip(roles, names, strict=True)]
        text = render(messages, tokenizer, tokenizer.chat_template, add_generation_prompt=True)
        found = []
        for name in names:
            before, _, text = text.partition(name)
            found.append(before)
        return [*found, text]

    beginning, after_question = parts("user")
    _, to_answer, to_question, _ = parts("user", "assistant", "user")
    before_system, from_system, _ = parts("system", "user")
    before_user = common_end(beginning, to_question, from_system)
    after_user = commonprefix([after_question, to_answer])
    pieces = {
        "no system": beginning.removesuffix(before_user),
        "before system": before_system,
        "after system": from_system.removesuffix(before_user),
        "before user": before_user,
        "after user": after_user,
        "before assistant": to_answer.removeprefix(after_user),
        "after assistant": to_question.removesuffix(before_user),
        "end": after_question.removeprefix(after_user),
    }
    for roles in (["user"], ["user", "assistant"] * 3 + ["user"]):
        for conversation in (roles, ["system", *roles]):
            text = "" if conversation[0] == "system" else pieces["no system"]
            found = []
            for role in conversation:
                found.append(text + pieces[f"before {role}"])
                text = pieces[f"after {role}"]
            if [*found, text + pieces["end"]] != parts(*conversation):
                return None
    return pieces


def common_end(*texts: str) -> str:
    """The longest end that the texts share."""
    return commonprefix([text[::-1] for text in texts])[::-1]
