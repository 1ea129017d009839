"""What other programs need to serve a merged checkpoint: the trained chat template and, for llama.cpp, a GGUF file.

A tuned prompt stands in front of every conversation, as special tokens whose embeddings are its vectors. The user's
words are kept from naming these tokens.
"""

import json
import re
import subprocess
import sys
from os.path import commonprefix
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import fail, say, warn
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

CONVERTER, GGUF = "convert_hf_to_gguf.py", "model.gguf"
OUTPUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # names of the converter
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
    """The template of a merged checkpoint, from the one beside its adapter: every conversation begins with `tokens`, a
    prompt in the plain format ends with `plain_start`."""
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


# ---- llama.cpp and Ollama


def find_converter(llama_cpp: str) -> Path:
    """The converter in a folder of llama.cpp's source."""
    converter = Path(llama_cpp, CONVERTER)
    if not converter.is_file():
        fail(f"--llama_cpp '{llama_cpp}' holds no {CONVERTER}; name the folder of llama.cpp's source")
    return converter


def write_gguf(converter: Path, folder: str, dtype: torch.dtype, modelfile: str | None) -> None:
    """Convert a merged checkpoint, which stays if the converter fails, to a GGUF file in its folder."""
    file = Path(folder, GGUF)
    command = [sys.executable, str(converter), folder, "--outfile", str(file), "--outtype", OUTPUT_TYPES[dtype]]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        file.unlink(missing_ok=True)
        reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        fail(
            f"{CONVERTER} failed: {reason}\n"
            f"The checkpoint in {folder} is whole; the converter needs: pip install gguf sentencepiece",
            1,
        )
    say(f"{file}: {file.stat().st_size / 2**20:,.1f} MB")
    if modelfile is None:
        warn("no Modelfile: the chat template has rules that Ollama's template language cannot express")
    else:
        Path(folder, "Modelfile").write_text(modelfile, encoding="utf-8")


def make_modelfile(tokenizer: PreTrainedTokenizerBase, greedy: bool) -> str | None:
    """The Modelfile with which Ollama serves the GGUF file beside it; None if Go's templates cannot say what the
    tokenizer's template says."""
    pieces = take_apart(tokenizer)
    if pieces is None:
        return None
    words = {name: text and "{{ " + json.dumps(text, ensure_ascii=False) + " }}" for name, text in pieces.items()}
    template = "{{- if not .System }}" + words["no system"] + "{{ end }}\n{{- range .Messages }}\n"
    for condition, role in (("if", "system"), ("else if", "user"), ("else if", "assistant")):
        message = words[f"before {role}"] + "{{ .Content }}" + words[f"after {role}"]
        template += f'{{{{- {condition} eq .Role "{role}" }}}}{message}\n'
    template += "{{- end }}\n{{- end }}" + words["end"]
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {token}" for token in stop_tokens(tokenizer)]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"] if greedy else []
    return "\n".join(lines) + "\n"


def take_apart(tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """What the tokenizer's template writes before and after the message of each role; None if that depends on more than
    the roles, or if the template trims messages: Go's would not."""

    def write(messages: list[Message]) -> str:
        return render(messages, tokenizer, tokenizer.chat_template, add_generation_prompt=True)

    def parts(*roles: str) -> list[str]:
        """The text of a conversation between its messages."""
        found = write([{"role": role, "content": "\ue000"} for role in roles]).split("\ue000", len(roles))
        return found + [""] * (len(roles) + 1 - len(found))

    def common_end(*texts: str) -> str:
        return commonprefix([text[::-1] for text in texts])[::-1]

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
            messages = [{"role": role, "content": f" {number} "} for number, role in enumerate(conversation)]
            text = "" if "system" in conversation else pieces["no system"]
            for message in messages:
                text += pieces[f"before {message['role']}"] + message["content"] + pieces[f"after {message['role']}"]
            if text + pieces["end"] != write(messages):
                return None
    return pieces
