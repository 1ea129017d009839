"""labels.py: which answers count as label words, and how people name them (trap 74)."""

import pytest

from finetuning.generation.labels import MAX_LABELS, choose_labels, find_labels, parse_labels, warn_about_labels
from finetuning.preprocessing.summary import Summary


def test_what_counts_as_label_words() -> None:
    assert find_labels(["yes", "no"] * 3) == ["yes", "no"]
    assert find_labels(["yes", "no"] * 2 + ["no"]) is None  # too few rows to tell
    assert find_labels(["yes"] * 9) is None
    assert find_labels(["", "no"] * 9) is None
    assert find_labels(["a whole sentence, which is no label word at all", "no"] * 9) is None


def test_any_word_can_be_a_label() -> None:
    """Commas separate labels, and a JSON list can hold labels with commas."""
    assert parse_labels("正面，负面, 中性") == ("正面", "负面", "中性")
    assert parse_labels('["a, b", "[c]", "\\"d\\""]') == ("a, b", "[c]", '"d"')


@pytest.mark.parametrize("text", ['["a"', '["a", 1]', "a", "a,,b", "a,a ", '["a", "a "]', "[]", "\u00e9,e\u0301"])
def test_labels_that_cannot_be_read(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_labels(text)
    assert f"--labels {text}" in capsys.readouterr().err


def summary(words: list[str]) -> Summary:
    return Summary(answers=[{"task": "mood", "label": word, "count": 3, "first": 1} for word in words])


def rows(*answers: str) -> list[dict[str, str]]:
    return [{"instruction": "a", "output": answer, "task": "mood"} for answer in answers]


def test_words_that_look_the_same_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    warn_about_labels(summary(["正面", "正面 ", "负面", "Good", "ＧＯＯＤ"]))
    message = capsys.readouterr().err
    assert "'正面' and '正面 ' are different" in message and "'Good' and 'ＧＯＯＤ'" in message
    assert len(message.splitlines()) == 2


def test_too_many_words_are_said_when_training_and_when_asking(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"w{n}" for n in range(MAX_LABELS + 1)]
    warn_about_labels(summary(words))
    assert f"{MAX_LABELS + 1} label words: --labels auto knows at most {MAX_LABELS}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        choose_labels("auto", rows("w1"), {"mood": words})
    assert f"more than the {MAX_LABELS}" in capsys.readouterr().err
    assert choose_labels("auto", rows("w1"), {"mood": words[1:]}) == [tuple(words[1:])]
