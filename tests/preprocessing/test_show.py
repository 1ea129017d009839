"""show.py: rows and prompts as people see them."""

import re

import pytest
from support import ENDOFTEXT, make_tokenizer, preprocess_row

from finetuning.preprocessing.dataset import EXAMPLE
from finetuning.preprocessing.encode import IGNORE_INDEX, tokenize
from finetuning.preprocessing.show import MOST_SHOWN, list_tokens, mark_answers, print_rows
from finetuning.preprocessing.templates import set_prompt_format

ROW = {"instruction": "Go", "input": "on", "output": "ok"}


def example(row: dict[str, str], max_length: int = 1000) -> tuple[dict[str, list[int]], object]:
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "plain")
    return preprocess_row(row, tokenizer, max_length), tokenizer


def show(row: dict[str, str], max_length: int = 1000) -> None:
    from datasets import Dataset

    ids, tokenizer = example(row, max_length)
    supervised = sum(label != IGNORE_INDEX for label in ids["labels"])
    counts = {"length": len(ids["input_ids"]), "row_number": 7, "supervised": supervised}
    columns = ids | counts | {"is_truncated": max_length < 1000}
    assert columns.keys() == EXAMPLE.keys()
    print_rows(Dataset.from_list([columns]), 5, tokenizer)


def test_mark_answers_shows_what_is_supervised() -> None:
    ids, tokenizer = example(ROW)
    text = mark_answers(ids["input_ids"], ids["labels"], tokenizer)
    assert text == "  reads  'Instruction: Go\\nInput: on'\n  writes '\\nOutput: ok<|endoftext|>'"


def test_every_id_is_shown_once_and_characters_stay_whole() -> None:
    tokenizer = make_tokenizer()
    text = "a早🙂\n \ufffd"
    ids = tokenize([text], tokenizer)[0] + [ENDOFTEXT, 0x97]  # the last is half a character
    shown = list_tokens(ids, tokenizer)
    assert [int(number) for group in re.findall(r"' (\d[\d,]*)", shown) for number in group.split(",")] == ids
    assert "'a' 97  '早' 230,151,169  '🙂' 240,159,153,130  '\\n' 10" in shown
    assert shown.endswith("'<|endoftext|>' 257  '\ufffd' 151")
    broken = list_tokens([0x97] * 9, tokenizer)
    assert broken.count("151") == 9 and broken.count("'") == 6  # never more than a character's bytes together


def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    show(ROW)
    printed = capsys.readouterr().out
    assert "row 7: 37 tokens, 12 of them supervised\n  reads  'Instruction: Go\\nInput: on'\n" in printed
    assert "'o' 111  'k' 107  '<|endoftext|>' 257\n" in printed and "\033" not in printed
    show(ROW, 30)
    assert "30 tokens, 5 of them supervised, truncated" in capsys.readouterr().out


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    """What is supervised is green, and a long part loses its middle; in a pipe it is complete."""
    monkeypatch.setenv("NO_COLOR", no_color)
    row = ROW | {"instruction": "x" * 100}
    show(row)
    whole = capsys.readouterr().out
    assert whole.count("'x' 120") == 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(row)
    printed = capsys.readouterr().out
    plain = re.sub(r"\033\[\d+m", "", printed)
    hidden = 100 + len("Instruction: \nInput: on") - MOST_SHOWN
    assert f"... {hidden} tokens, shown in a pipe: | cat ..." in plain and "'o' 111  'n' 110\n" in plain
    if no_color:
        assert plain == printed
    else:
        assert "\033[32m  writes '\\nOutput: ok<|endoftext|>'\033[0m\n" in printed and "\033[2m120\033[0m" in printed
        assert not re.search(r"\033\[32m *reads", printed)
