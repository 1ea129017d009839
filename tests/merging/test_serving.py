"""serving.py: other programs write the prompts that were trained."""

import re

import pytest
from support import CHATML, THINKERS, make_tokenizer

from finetuning.merging.serving import (
    choose_plain_start,
    make_modelfile,
    serve_template,
    soft_tokens,
    take_apart,
)
from finetuning.preprocessing.encode import encode, tokenize
from finetuning.preprocessing.templates import set_prompt_format, set_thinking

USER, ANSWER, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER]]
TEMPLATES = {"ChatML": CHATML} | THINKERS


def tokenizer_for(name: str, thinking: bool = False):
    tokenizer = make_tokenizer("<|im_end|>", TEMPLATES[name]) if name != "plain" else make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    set_thinking(tokenizer, thinking)
    return tokenizer


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", ["plain", *TEMPLATES])
def test_served_template_writes_the_trained_text(name: str, thinking: bool) -> None:
    """After the tokens of a soft prompt, once, also if it is made again for a merged checkpoint."""
    tokenizer = tokenizer_for(name, thinking)
    trained = tokenizer.chat_template
    for tokens in ([], soft_tokens(3)):
        served = serve_template(trained, tokens)
        for messages in CONVERSATIONS:
            texts = [
                tokenizer.apply_chat_template(messages, chat_template=it, tokenize=False, add_generation_prompt=True)
                for it in (trained, served, serve_template(served, []))
            ]
            assert texts[1] == texts[2] == "".join(tokens) + texts[0]


def test_start_of_a_plain_answer() -> None:
    """In the prompt, where a chat does not show it, if that gives the trained token ids for every question."""
    tokenizer = tokenizer_for("plain")
    question = [USER | {"content": "翻译\nInput: 早安"}]
    (answer,) = tokenize(["\nOutput: ok"], tokenizer)
    assert choose_plain_start(tokenizer, [question], [answer]) == ""  # the tokenizer joins two line breaks
    together = make_tokenizer()
    together.backend_tokenizer.model = type(together.backend_tokenizer.model)(
        together.backend_tokenizer.get_vocab(), []
    )
    set_prompt_format(together, "auto")
    assert choose_plain_start(together, [question], [answer]) == "\nOutput:"
    assert choose_plain_start(together, [question], [answer, answer[1:]]) == ""  # an answer begins otherwise
    together.chat_template = serve_template(together.chat_template, [], "\nOutput:")
    assert tokenize(["\nOutput:"], together)[0] == encode(question, together)[-1]["input_ids"][-8:]
    assert choose_plain_start(together, [question], [answer]) == ""  # it is there
    assert choose_plain_start(tokenizer_for("ChatML"), [question], [answer]) == ""


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a conversation, for the few constructs that make_modelfile uses."""
    frame = "{{- if not .System }}(.*?){{ end }}\n{{- range .Messages }}\n(.*)\n{{- end }}\n{{- end }}(.*)"
    frame = frame.replace("{{", r"\{\{").replace("}}", r"\}\}").replace(" .", r" \.")
    system, branches, end = re.fullmatch(frame, template, flags=re.S).groups()
    by_role = dict(re.findall(r'\{\{- (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\n\{\{-|$)', branches, flags=re.S))

    def text(piece: str, content: str = "") -> str:
        found = re.findall(r'\{\{ (?:(\.Content)|"((?:[^"\\]|\\.)*)") \}\}', piece)
        return "".join(content if name else word.replace("\\n", "\n").replace('\\"', '"') for name, word in found)

    start = "" if messages[0]["role"] == "system" else text(system)
    return start + "".join(text(by_role[it["role"]], it["content"]) for it in messages) + text(end)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", ["plain", *TEMPLATES])
def test_modelfile(name: str, thinking: bool) -> None:
    """Ollama's template writes what the trained one writes."""
    tokenizer = tokenizer_for(name, thinking)
    tokenizer.chat_template = serve_template(tokenizer.chat_template, soft_tokens(2))
    modelfile = make_modelfile(tokenizer, greedy=True)
    assert (modelfile is None) == (name == "opens")  # it trims answers, as Qwen3.5's trims all texts: Go's would not
    if modelfile is None:
        return
    template = re.search('TEMPLATE """(.*?)"""\n', modelfile, flags=re.S)[1]
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go(template, messages) == expected


def test_template_beyond_go() -> None:
    """What a message becomes depends on more than its role here."""
    tokenizer = tokenizer_for("ChatML")
    tokenizer.chat_template = CHATML.replace("m.role + '\\n'", "m.role + loop.index|string + '\\n'")
    assert take_apart(tokenizer) is None and make_modelfile(tokenizer, greedy=False) is None
