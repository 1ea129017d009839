"""How good answers are: exact match, BLEU and chrF of texts; accuracy, macro-F1 and confusions of label words."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from console import say, warn
from labels import find_labels
from rows import by_task, expected_answer

METRICS = "metrics.json"
OTHER = "(other)"  # in a confusion matrix: an answer that is no label
LARGEST_TABLE = 12  # labels; a larger confusion matrix is left to the file


def missing_scorers() -> list[str]:
    """The packages that `score` needs and that are not installed: the contract's pip command does not bring them."""
    return [name for module, name in (("sacrebleu", "sacrebleu"), ("sklearn", "scikit-learn")) if not find_spec(module)]


def report(rows: list[dict[str, Any]], predictions: list[dict[str, Any]], file: Path | None, **head: Any) -> None:
    """Print how many answers were cut and, where the rows hold the right answers, the scores.

    Args:
        predictions: `prediction`, and `cut` where an answer did not end, for each row.
        file: where the same goes as JSON.
        head: what the file says before.
    """
    cut = sum("cut" in prediction for prediction in predictions)
    say(f"{len(rows)} rows answered, {cut} of the answers cut before their end")
    head |= {"rows": len(rows), "cut": cut}
    numbers = [number for number, row in enumerate(rows) if expected_answer(row) is not None]
    if missing_scorers():
        warn(f"no scores without {' and '.join(missing_scorers())}: pip install {' '.join(missing_scorers())}")
    elif numbers:
        head["scores"] = score(
            [rows[number] for number in numbers],
            [predictions[number]["prediction"] for number in numbers],
            [expected_answer(rows[number]) for number in numbers],
        )
        say(format_scores(head["scores"]))
    if file:
        file.write_text(json.dumps(head, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def score(rows: list[dict[str, Any]], answers: list[str], references: list[str]) -> dict[str, dict[str, Any]]:
    """Compare answers with the right ones, white space around them left out.

    Args:
        rows: may hold `task`, by which they are grouped.
        answers, references: one for each row.

    Returns:
        For each task in order of appearance, and for "all" where there are several: `rows` (a count), `exact_match`
        (percent), and

        where the references are texts: `bleu` and `chrf` (sacrebleu's corpus BLEU and chrF2, 0 to 100), and
        `bleu_tokenizer`, "zh" where a reference holds Chinese characters, else "13a";

        where they are label words (`find_labels`): `accuracy` (percent), `macro_f1` (mean F1 of the labels, percent),
        `labels`, and `confusion_matrix`, whose row is the right label and whose column is the answer, in the order of
        `labels` and then any other answer.
    """
    groups = by_task(rows)
    if len(groups) > 1:
        groups["all"] = list(range(len(rows)))
    return {
        task: score_group(
            [answers[number].strip() for number in numbers], [references[number].strip() for number in numbers]
        )
        for task, numbers in groups.items()
    }


def score_group(answers: list[str], references: list[str]) -> dict[str, Any]:
    exact_match = 100 * sum(map(str.__eq__, answers, references)) / len(references)
    common = {"rows": len(references), "exact_match": exact_match}
    labels = find_labels(references)
    if labels is None:
        return common | score_texts(answers, references)
    return common | score_label_words(answers, references, labels)


def score_texts(answers: list[str], references: list[str]) -> dict[str, Any]:
    from sacrebleu import corpus_bleu, corpus_chrf  # here, because training does not need it

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
    """Markdown tables of what `score` returns: one for all tasks, and a confusion matrix for each with label words."""
    lines = ["| task | rows | exact match | macro-F1 | BLEU | chrF |", "|---|--:|--:|--:|--:|--:|"]
    for task, values in scores.items():
        numbers = [f"{values[name]:.1f}" if name in values else "" for name in ("macro_f1", "bleu", "chrf")]
        lines.append(f"| {task} | {values['rows']} | {values['exact_match']:.1f}% | {' | '.join(numbers)} |")
    for task, values in scores.items():
        if "labels" in values and len(values["labels"]) <= LARGEST_TABLE:
            lines += ["", f"| {task}: right answer | {' | '.join([*values['labels'], OTHER])} |"]
            lines.append("|---|" + "--:|" * (len(values["labels"]) + 1))
            for label, counts in zip(values["labels"], values["confusion_matrix"], strict=True):
                lines.append(f"| {label} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)
