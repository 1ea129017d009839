"""Scores: exact match, BLEU and chrF for texts; accuracy, macro-F1 and the confusion matrix for label words."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np

from finetuning.cli.console import attempt, say, warn
from finetuning.generation.labels import find_labels
from finetuning.model.folder import CONFUSION, METRICS
from finetuning.preprocessing.rows import right_answer, task_of, to_nfc

OTHER = "(other)"  # in a confusion matrix: any answer that is not a label
LARGEST_TABLE = 12  # labels; a larger confusion matrix is only in the file
MAX_DRAWN = 40  # labels; a larger matrix is only in the file of the scores
# Parts of the file names of fonts that have Chinese characters; matplotlib's own has none.
CHINESE_FONTS = ("cjk", "sourcehan", "pingfang", "hiragino", "heiti", "msyh", "simhei", "wqy", "arial unicode")


def report(
    rows: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
    labels: dict[str, list[str]],
    file: Path | None,
    **head: Any,
) -> str:
    """Print how many answers were cut and, for rows with the right answer, the scores.

    Args:
        predictions: for each row `prediction`, and `cut` if the answer did not end.
        labels: the label words of each task in the training data, from `labels_of_tasks`.
        file: gets the same as JSON; the confusion matrices are drawn beside it.
        head: fields to put first in the file.

    Returns:
        The scores as Markdown, "" if there are none.
    """
    cut = sum("cut" in prediction for prediction in predictions)
    say(f"{len(rows)} rows answered, {cut} of the answers cut before their end")
    head |= {"rows": len(rows), "cut": cut}
    table = ""
    numbers = [number for number, row in enumerate(rows) if right_answer(row) is not None]
    # the README's shortest pip command does not install these
    scorers = {"sacrebleu": "sacrebleu", "sklearn": "scikit-learn"}
    missing = [package for module, package in scorers.items() if not find_spec(module)]
    if missing:
        warn(f"no scores without {' and '.join(missing)}: pip install {' '.join(missing)}")
    elif numbers:
        head["scores"] = score(
            [rows[number] for number in numbers],
            [to_nfc(predictions[number]["prediction"]) for number in numbers],
            [to_nfc(right_answer(rows[number])) for number in numbers],
            {task: list(map(to_nfc, words)) for task, words in labels.items()},
        )
        table = format_scores(head["scores"])
        say(table)
    if file:
        file.write_text(json.dumps(head, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        picture = file.with_name(file.name.removesuffix(METRICS) + CONFUSION)
        if find_spec("matplotlib"):
            with attempt(picture.name):
                draw_confusion(head.get("scores", {}), picture)
    return table


def score(
    rows: list[dict[str, Any]], answers: list[str], references: list[str], labels: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Compare answers with the right ones, ignoring white space around them.

    Args:
        labels: the label words of tasks, where they are known; few rows do not show them.

    Returns:
        For each task in order of appearance, and for "all" ("all tasks" if there is a task of that name) if there are
        several: `rows` (a count), `exact_match` (percent), and

        if the references are texts: `bleu` and `chrf` (sacrebleu's corpus BLEU and chrF2, 0 to 100), and
        `bleu_tokenizer`, "zh" if a reference has Chinese characters, else "13a";

        if they are label words (known ones, or `find_labels`): `accuracy` (percent), `macro_f1` (mean F1 of the labels,
        percent), `labels`, and `confusion_matrix`: a row for each right label, a column for each answered label, in the
        order of `labels`, and a last column for any other answer.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(task_of(row), []).append(number)
    known = {task: list(dict.fromkeys(map(str.strip, words))) for task, words in labels.items()}
    if len(groups) > 1:
        groups["all tasks" if "all" in groups else "all"] = list(range(len(rows)))
    return {
        task: score_group(
            [answers[number].strip() for number in numbers],
            [references[number].strip() for number in numbers],
            known.get(task, []),
        )
        for task, numbers in groups.items()
    }


def score_group(answers: list[str], references: list[str], known_labels: list[str]) -> dict[str, Any]:
    common = {
        "rows": len(references),
        "exact_match": 100 * sum(map(str.__eq__, answers, references)) / len(references),
    }
    labels = known_labels if set(references) <= set(known_labels) else find_labels(references)
    return common | (score_label_words(answers, references, labels) if labels else score_texts(answers, references))


def score_texts(answers: list[str], references: list[str]) -> dict[str, Any]:
    from sacrebleu import corpus_bleu, corpus_chrf  # here because training does not need it

    chinese = any("\u4e00" <= character <= "\u9fff" for text in references for character in text)
    tokenizer = "zh" if chinese else "13a"
    return {
        "bleu": corpus_bleu(answers, [references], tokenize=tokenizer).score,
        "chrf": corpus_chrf(answers, [references]).score,
        "bleu_tokenizer": tokenizer,
    }


def score_label_words(answers: list[str], references: list[str], labels: list[str]) -> dict[str, Any]:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    predicted = [answer if answer in labels else OTHER for answer in answers]
    return {
        "accuracy": 100 * accuracy_score(references, predicted),
        "macro_f1": 100 * f1_score(references, predicted, labels=labels, average="macro", zero_division=0),
        "labels": labels,
        "confusion_matrix": confusion_matrix(references, predicted, labels=[*labels, OTHER])[:-1].tolist(),
    }


def format_scores(scores: dict[str, dict[str, Any]]) -> str:
    """The result of `score` as Markdown: a table of all tasks, and a confusion matrix for each with label words."""
    rows = [["task", "rows", "exact match", "macro-F1", "BLEU", "chrF"]]
    for task, values in scores.items():
        numbers = [f"{values[name]:.1f}" if name in values else "" for name in ("macro_f1", "bleu", "chrf")]
        rows.append([task, str(values["rows"]), f"{values['exact_match']:.1f}%", *numbers])
    tables = [format_table(rows)]
    for task, values in scores.items():
        if "labels" in values and len(values["labels"]) <= LARGEST_TABLE:
            rows = [[f"{task}: right answer", *values["labels"], OTHER]]
            for label, counts in zip(values["labels"], values["confusion_matrix"], strict=True):
                rows.append([label, *map(str, counts)])
            tables.append(format_table(rows))
    return "\n\n".join(tables)


def format_table(rows: list[list[str]]) -> str:
    """A Markdown table of a head and its rows, whose columns line up in a terminal, with Chinese words too."""
    columns = []
    for place, column in enumerate(zip(*rows, strict=True)):
        widths = [sum(2 if east_asian_width(letter) in "FW" else 1 for letter in cell) for cell in column]
        spaces = [" " * (max(widths) - width) for width in widths]
        cells = [cell + space if place == 0 else space + cell for cell, space in zip(column, spaces, strict=True)]
        line = "-" * (max(widths) + 2) if place == 0 else "-" * (max(widths) + 1) + ":"
        columns.append([f" {cells[0]} ", line, *(f" {cell} " for cell in cells[1:])])
    return "\n".join(f"|{'|'.join(cells)}|" for cells in zip(*columns, strict=True))


def find_chinese_font() -> str | None:
    """The name of a font with Chinese characters. matplotlib's own list may be older than the font."""
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    fonts = [path for path in findSystemFonts() if any(part in Path(path).name.lower() for part in CHINESE_FONTS)]
    if not fonts:
        return None
    font = min(fonts, key=lambda path: ("regular" not in path.lower(), "serif" in path.lower(), path))
    fontManager.addfont(font)
    return FontProperties(fname=font).get_name()


def draw_confusion(scores: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw a matrix for each task that has label words: a row for each right label, a column for each answer."""
    from matplotlib import rc_context, style  # here because scores are computed without it too
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    tasks = {task: values for task, values in scores.items() if 0 < len(values.get("labels", ())) <= MAX_DRAWN}
    if not tasks:
        return
    words = "".join([*tasks, *(label for values in tasks.values() for label in values["labels"])])
    font = None if words.isascii() else find_chinese_font()
    numbered = not font and not words.isascii()
    if numbered:
        warn(f"{file}: no font has Chinese characters, so labels are numbered as in the scores; install fonts-noto-cjk")
    sides = [1.8 + 0.42 * (len(values["labels"]) + 1) for values in tasks.values()]
    with style.context("default"), rc_context({"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"]}):
        figure = Figure(figsize=(max(sides), sum(sides)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(tasks), squeeze=False, height_ratios=sides)[:, 0]
        for place, ((task, values), axes) in enumerate(zip(tasks.items(), panels, strict=True), 1):
            names = [str(number) for number in range(1, len(values["labels"]) + 1)] if numbered else values["labels"]
            matrix = values["confusion_matrix"]
            if any(counts[-1] for counts in matrix):  # answers that are no label; no right answer is one
                names, matrix = [*names, OTHER], [*matrix, [0] * len(matrix[0])]
            else:
                matrix = [counts[:-1] for counts in matrix]
            picture = ConfusionMatrixDisplay(np.array(matrix), display_labels=names)
            picture.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
            axes.set(title=f"task {place}" if numbered else task, xlabel="answer", ylabel="right answer")
        figure.savefig(file, dpi=130)
