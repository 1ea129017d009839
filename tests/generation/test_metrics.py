"""metrics.py: the figures are those of sacrebleu's and scikit-learn's own commands."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from unicodedata import normalize
from unittest.mock import Mock

import pytest
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from finetuning.generation import metrics
from finetuning.generation.answer_page import judge
from finetuning.generation.metrics import format_scores, format_table, report, score

ENGLISH = (
    ["The cat sat on the mat.", "It isn't far, is it?", "Good morning", "Rain tomorrow."],
    ["The cat sat on a mat.", "It is not far, is it?", "Good morning", "It will rain tomorrow in the north."],
)
CHINESE = (
    ["今天天气很好，我们去公园。", "他喜欢猫", "早安。", "我在 Python 里写了 3 行。"],
    ["今天天气不错，我们去公园吧。", "他喜欢猫。", "早上好。", "我用 Python 写了三行代码。"],
)


def command(*words: str, folder: Path) -> str:
    result = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, encoding="utf-8", check=True)
    return result.stdout


@pytest.mark.parametrize(("answers", "references", "tokenizer"), [(*ENGLISH, "13a"), (*CHINESE, "zh")])
def test_texts(answers: list[str], references: list[str], tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    (tmp_path / "references.txt").write_text("\n".join(references) + "\n", encoding="utf-8")
    words = f"-m sacrebleu references.txt -i answers.txt -m bleu chrf -tok {tokenizer} -w 6 -f json"
    bleu, chrf = json.loads(command(*words.split(), folder=tmp_path))
    scores = score([{}] * 4, answers, references, {})["rows"]
    assert scores["bleu_tokenizer"] == tokenizer
    assert scores["bleu"] == pytest.approx(bleu["score"], abs=1e-5)
    assert scores["chrf"] == pytest.approx(chrf["score"], abs=1e-5)
    assert scores["exact_match"] == 100 * sum(map(str.__eq__, answers, references)) / 4


SKLEARN = """
import json, sys
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score
answers, references = (open(name, encoding="utf-8").read().split() for name in ("answers.txt", "references.txt"))
labels = list(dict.fromkeys(references))
report = classification_report(references, answers, labels=labels, output_dict=True, zero_division=0)
print(json.dumps([accuracy_score(references, answers), report["macro avg"]["f1-score"],
                  confusion_matrix(references, answers, labels=labels).tolist()]))
"""


@pytest.mark.parametrize("other", ["好", "什么"])
def test_label_words(other: str, tmp_path: Path) -> None:
    """`什么` is no label: it is wrong wherever it stands, and no class of its own."""
    references = ["好", "坏", "中", "坏", "好", "中", "中", "坏", "好", "好"]
    answers = ["好", "坏", "坏", "坏", other, "中", "好", "中", "好", "好"]
    (tmp_path / "answers.txt").write_text("\n".join(answers), encoding="utf-8")
    (tmp_path / "references.txt").write_text("\n".join(references), encoding="utf-8")
    accuracy, macro_f1, matrix = json.loads(command("-c", SKLEARN, folder=tmp_path))
    scores = score([{}] * 10, answers, references, {})["rows"]
    assert scores["accuracy"] == scores["exact_match"] == pytest.approx(100 * accuracy)
    assert scores["macro_f1"] == pytest.approx(100 * macro_f1)
    assert [row[:-1] for row in scores["confusion_matrix"]] == matrix
    assert sum(row[-1] for row in scores["confusion_matrix"]) == (other == "什么")
    assert "bleu" not in scores


def test_by_task() -> None:
    rows = [{"task": "a"}, {"task": "b"}, {"task": "a"}, {"task": ["odd"]}]
    scores = score(rows, ["x ", "y", "z", "w"], ["x", "n", "z", "w"], {})
    assert list(scores) == ["a", "b", "['odd']", "all"]
    assert [values["rows"] for values in scores.values()] == [2, 1, 1, 4]
    assert [values["exact_match"] for values in scores.values()] == [100, 0, 100, 75]
    table = format_scores(scores)
    assert "| a       |    2 |      100.0% |          | " in table and table.count("\n") == 5


def test_columns_line_up() -> None:
    """In a terminal, where a Chinese character is as wide as two others."""
    table = format_table([["task", "行数"], ["天气", "12"], ["translate", "3"]])
    assert table == "| task      | 行数 |\n|-----------|-----:|\n| 天气      |   12 |\n| translate |    3 |"


def test_a_task_called_all() -> None:
    """Its scores are not those of the total."""
    scores = score([{"task": "all"}, {"task": "b"}], ["x", "y"], ["x", "n"], {})
    assert [scores[name]["exact_match"] for name in ("all", "b", "all tasks")] == [100, 0, 50]


def test_few_rows_are_scored_with_the_label_words_of_training() -> None:
    rows, labels = [{"task": "mood"}] * 2, {"mood": ["good", "bad", "so-so"]}
    scores = score(rows, ["good", "odd"], ["good", "bad"], labels)["mood"]
    assert scores["accuracy"] == 50 and scores["labels"] == labels["mood"] and "bleu" not in scores
    assert "bleu" in score(rows, ["good", "odd"], ["good", "terrible"], labels)["mood"]


def test_answers_in_decomposed_unicode(tmp_path: Path) -> None:
    """Trap 89: Qwen's tokenizer composes, so no answer can equal a reference that macOS has written."""
    words = ["tích cực", "tiêu cực"] * 3
    rows = [{"instruction": "a", "output": normalize("NFD", word)} for word in words]
    predictions = [{"prediction": word} for word in words]
    for labels in ({}, {"rows": [normalize("NFD", word) for word in words[:2]]}):
        metrics.report(rows, predictions, labels, tmp_path / "a.json")
        scores = json.loads((tmp_path / "a.json").read_text())["scores"]["rows"]
        assert scores["exact_match"] == 100 and scores["labels"] == words[:2] and len(scores["confusion_matrix"]) == 2
    assert judge(rows[0], predictions[0]) == "right"


def test_masked_answers_are_not_compared(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "BAD", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]}, {"instruction": "a", "output": "b"}]
    metrics.report(rows, [{"prediction": "c"}, {"prediction": "b"}], {}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["scores"]["rows"]["rows"] == 1
    assert judge(rows[0], {"prediction": "c"}) == "open"


LABELS = {
    "a": {"labels": ["x", "y"], "confusion_matrix": [[3, 0, 0], [1, 2, 4]]},
    "b": {"labels": ["好", "坏"], "confusion_matrix": [[3, 0, 0], [1, 2, 0]]},
    "c": {"bleu": 1.0},
}


@pytest.mark.parametrize("font", [True, False])
def test_picture_of_the_confusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], font: bool
) -> None:
    """Every label has its row, other answers have a column; without a Chinese font labels are numbered, with a word."""
    shown = []

    class Display(ConfusionMatrixDisplay):
        def plot(self, **more: object) -> ConfusionMatrixDisplay:
            shown.append((self.confusion_matrix.tolist(), list(self.display_labels)))
            return super().plot(**more)

    monkeypatch.setattr("sklearn.metrics.ConfusionMatrixDisplay", Display)
    monkeypatch.setattr(metrics, "find_chinese_font", lambda: "DejaVu Sans" if font else None)
    with warnings.catch_warnings(action="ignore"):  # the font stands for one that has the characters
        metrics.draw_confusion(LABELS, tmp_path / "confusion.png")
    names = (["x", "y"], ["好", "坏"]) if font else (["1", "2"], ["1", "2"])
    assert shown == [([[3, 0, 0], [1, 2, 4], [0, 0, 0]], [*names[0], "(other)"]), ([[3, 0], [1, 2]], names[1])]
    assert Image.open(tmp_path / "confusion.png").width > 200
    assert ("fonts-noto-cjk" in capsys.readouterr().err) != font
    metrics.draw_confusion({"c": {"bleu": 1.0}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_picture_lies_beside_the_scores_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "?", "output": word} for word in "xyxyxyxy"]
    predictions = [{"prediction": "x"}] * 8
    report(rows, predictions, {}, tmp_path / "answers.metrics.json")
    assert (tmp_path / "answers.confusion.png").exists()
    monkeypatch.setattr("finetuning.generation.metrics.draw_confusion", Mock(side_effect=RuntimeError("no font")))
    table = report(rows, predictions, {}, tmp_path / "metrics.json")
    assert "| rows |    8 |       50.0% |" in table and "confusion.png could not be written" in capsys.readouterr().err
