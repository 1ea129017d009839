"""label_words.py: which answers count as label words."""

from finetuning.preprocessing.label_words import find_labels


def test_what_counts_as_label_words() -> None:
    assert find_labels(["yes", "no"] * 3) == ["yes", "no"]
    assert find_labels(["yes", "no"] * 2 + ["no"]) is None  # too few rows to tell
    assert find_labels(["yes"] * 9) is None
    assert find_labels(["", "no"] * 9) is None
    assert find_labels(["a whole sentence, which is no label word at all", "no"] * 9) is None
    assert find_labels([str(n) for n in range(50)] * 3) and not find_labels([str(n) for n in range(51)] * 3)
