"""templates.py: reasoning reaches the loss as it is, and the saved template asks what was trained (traps 57-59)."""

import json
from pathlib import Path

import pytest
from support import CHATML, IM_END, THINKERS, THINKING, make_tokenizer, preprocess, preprocess_row

from finetuning.generation.generate import parse_generated, without_answer
from finetuning.model.folder import choose_thinking
from finetuning.preprocessing.encode import IGNORE_INDEX, encode
from finetuning.preprocessing.rows import split_reasoning
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import is_thinking, set_prompt_format, set_thinking

THOUGHT = {"instruction": "Go", "output": " ok\n\n", "reasoning_content": "hm\n\nhm"}
PLAIN = {"instruction": "Go", "output": " ok\n\n"}
USER = [{"role": "user", "content": "Go"}]
START = "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_for(template: str):
    tokenizer = make_tokenizer("<|im_end|>", THINKERS.get(template, template))
    set_prompt_format(tokenizer, "auto")
    return tokenizer


def parts(row: dict, tokenizer) -> tuple[str, str]:
    """What the only example of a row reads, and what it learns to write."""
    return split(preprocess_row(row, tokenizer, 1000), tokenizer)


def split(example: dict, tokenizer) -> tuple[str, str]:
    read = sum(label == IGNORE_INDEX for label in example["labels"])
    assert example["labels"][read:] == example["input_ids"][read:]
    return tokenizer.decode(example["input_ids"][:read]), tokenizer.decode(example["input_ids"][read:])


# What follows the start of the assistant's turn, in the prompt and in the answer.
READS_AND_WRITES = {
    "switch": ("", "<think>\nhm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"),
    "opens": ("<think>\n", "hm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"),
    "always": ("<think>\n", "hm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"),
    "forgets": ("<think>\n", "hm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"),
}


@pytest.mark.parametrize("mode", [False, True], ids=["saved without thinking", "saved with thinking"])
@pytest.mark.parametrize("name", THINKERS)
def test_reasoning_is_supervised_in_thinking_mode(name: str, mode: bool) -> None:
    """Traps 58, 59: each row in its own mode, whatever is saved; nothing is trimmed; empty reasoning is masked."""
    tokenizer = tokenizer_for(name)
    set_thinking(tokenizer, mode)
    prompt, answer = READS_AND_WRITES[name]
    assert parts(THOUGHT, tokenizer) == (START + prompt, answer)
    assert parts(PLAIN, tokenizer) == (START + "<think>\n\n</think>\n\n", " ok\n\n<|im_end|>")


@pytest.mark.parametrize("name", THINKERS)
def test_any_program_asks_in_the_saved_mode(name: str) -> None:
    """Trap 57: a bare apply_chat_template renders the prompt that was trained, in either mode."""
    tokenizer = tokenizer_for(name)
    for thinking in (False, True, False, True):
        set_thinking(tokenizer, thinking)
        assert is_thinking(tokenizer) == thinking
        asked = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        assert asked == parts(THOUGHT if thinking else PLAIN, tokenizer)[0]
        assert tokenizer.decode(encode(USER, tokenizer)[-1]["input_ids"]) == asked
    set_thinking(tokenizer, False)
    template = tokenizer.chat_template
    set_prompt_format(tokenizer, "auto")  # once more, as inference does
    assert tokenizer.chat_template == template


def test_reasoning_in_formats_that_know_none() -> None:
    """They are the beginning of the answer, as text."""
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    assert parts(THOUGHT, tokenizer)[1] == "\nOutput: <think>\nhm\n\nhm\n</think>\n\n ok\n\n<|endoftext|>"
    assert parts(THOUGHT, tokenizer_for(CHATML))[1] == "<think>\nhm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"
    # a template that always writes an empty thought loses it to the prompt's
    assert parts(THOUGHT, tokenizer_for(THINKING))[1] == "<think>\nhm\n\nhm\n</think>\n\n ok\n\n<|im_end|>"
    for known in (tokenizer, tokenizer_for(CHATML)):
        set_thinking(known, True)
        assert not is_thinking(known)


@pytest.mark.parametrize("name", [*THINKERS, CHATML], ids=[*THINKERS, "ChatML"])
def test_conversations(name: str) -> None:
    """Each answer is supervised in its own mode, after the earlier turns as the template shows them."""
    tokenizer = tokenizer_for(name)
    messages = [*USER, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    messages += [{"role": "user", "content": "On"}, {"role": "assistant", "content": "b\n"}]
    written = [split(example, tokenizer) for example in encode(messages, tokenizer)]
    assert [answer.replace("<think>\n", "") for _, answer in written] == [
        "hm\n</think>\n\na<|im_end|>",
        "b\n<|im_end|>",
    ]
    assert "hm" not in written[1][0]


def test_control_tokens_in_reasoning_are_text() -> None:
    row = THOUGHT | {"reasoning_content": "a<|im_end|>b"}
    example = preprocess_row(row, tokenizer_for("switch"), 1000)
    assert example["labels"].count(IM_END) == 1 and "a<|im_end|>b" in parts(row, tokenizer_for("switch"))[1]


def test_generated_reasoning_is_told_from_answers() -> None:
    for name, text in [("switch", "<think>\nhm\n</think>\n\n  ok"), ("opens", "hm\n</think>\n\n  ok")]:
        tokenizer = tokenizer_for(name)
        set_thinking(tokenizer, True)
        assert parse_generated(text, tokenizer) == ("hm", "  ok")
        assert parse_generated(text.split("</think>")[0], tokenizer) == ("hm", "")  # cut
    assert split_reasoning("a <think>b</think>") == ("", "a <think>b</think>")


def write(tmp_path: Path, *rows: dict) -> str:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_most_rows_choose_the_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_for("switch")
    inside = {"instruction": "Go", "output": "<think>hm</think>ok"}
    path = write(tmp_path, THOUGHT, inside, PLAIN, inside | {"output": "<think>\n\n</think>\n\nok"})
    examples = preprocess(path, tokenizer, 1000).dataset
    text = [tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX]) for row in examples]
    assert text[1:] == ["<think>\nhm\n</think>\n\nok<|im_end|>", " ok\n\n<|im_end|>", "ok<|im_end|>"]
    assert "2 rows have reasoning before their answer: trained in thinking mode" in capsys.readouterr().out
    for wanted, rows, thinking in [("auto", 4, False), ("auto", 3, True), ("on", 4, True)]:
        choose_thinking(tokenizer, Summary(path, kept=rows, reasoning=2), wanted)
        assert is_thinking(tokenizer) == thinking


def test_thinking_off_leaves_reasoning_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_for("opens")
    messages = [*USER, {"role": "assistant", "content": "<think>hm</think>ok"}]
    data = preprocess(write(tmp_path, THOUGHT, {"messages": messages}), tokenizer, 1000, "off")
    assert "2 rows have reasoning before their answer: left out" in capsys.readouterr().out
    assert all("hm" not in tokenizer.decode(row["input_ids"]) for row in data.dataset) and len(data.dataset) == 2
    with pytest.raises(SystemExit):
        choose_thinking(tokenizer, data.summary, "on")
    assert "--thinking on: no row of" in capsys.readouterr().err


def test_a_question_has_neither_answer_nor_reasoning() -> None:
    assert without_answer(THOUGHT) == {"instruction": "Go"}
    messages = [*USER, {"role": "assistant", "content": "ok", "reasoning_content": "hm"}]
    assert without_answer({"messages": messages}) == {"messages": USER}
