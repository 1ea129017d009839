"""The answers to a data file as one HTML page without network: questions, answers, and what is wrong in them."""

import base64
import hashlib
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from finetuning.generation.generate import without_answer
from finetuning.preprocessing.rows import right_answer, task_of, to_nfc

# What a difference is made of: a word of an alphabet or a number; else a character, as in Chinese.
UNIT = re.compile(r"[0-9A-Za-z\u00c0-\u024f\u0370-\u052f]+|.", re.DOTALL)
MAX_COMPARED = 2_000_000  # pairs of units; the time of a comparison grows with them


def sha256(text: str) -> str:
    """The hash by which a Content-Security-Policy knows a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(
    file: str, rows: list[dict[str, Any]], predictions: list[dict[str, Any]], scores: str, **sources: str | None
) -> None:
    """Write the page.

    Args:
        predictions: for each row `prediction`, and perhaps `thought`, `cut` and `probabilities`.
        scores: as Markdown; "" if there are none.
        sources: what the answers come from, by name.
    """
    articles = []
    for row, prediction in zip(rows, predictions, strict=True):
        verdict = judge(row, prediction)
        articles.append((task_of(row), prediction, verdict, list_texts(row, prediction, verdict)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = sha256
    text = environment.get_template("answer_page.html.jinja").render(
        articles=articles,
        verdicts=[verdict for _, _, verdict, _ in articles],
        tasks={task: number for number, task in enumerate(dict.fromkeys(map(task_of, rows)))},
        source=", ".join(f"{name} {value}" for name, value in sources.items() if value),
        scores=scores,
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8", errors="replace")


def judge(row: dict[str, Any], prediction: dict[str, Any]) -> str:
    """Call an answer right or wrong, ignoring white space around it as the scores do; open if there is nothing to
    compare it with."""
    expected = right_answer(row)
    if expected is None:
        return "open"
    return "right" if to_nfc(prediction["prediction"]).strip() == to_nfc(expected).strip() else "wrong"


def list_texts(row: dict[str, Any], prediction: dict[str, Any], verdict: str) -> list[tuple[str, str]]:
    """The turns of a row, its answer and, if that is wrong, the right one, each with its title."""
    asked, answer = without_answer(row), prediction["prediction"]
    if "messages" in asked:
        texts = [(message["role"], message["content"]) for message in asked["messages"]]
    else:
        turns = [(("user", said), ("assistant", answered)) for said, answered in asked.get("history") or []]
        texts = [("system", asked.get("system")), *(text for turn in turns for text in turn)]
        texts += [("instruction", asked["instruction"]), ("input", asked.get("input"))]
        texts = [(name, text) for name, text in texts if text or name not in ("system", "input")]
    texts += [("thought", prediction["thought"])] if prediction.get("thought") else []
    if verdict != "wrong":
        return [*texts, ("answer", answer)]
    return [*texts, *zip(("answer", "right answer"), mark_difference(answer, right_answer(row)), strict=True)]


def mark_difference(answer: str, expected: str) -> tuple[str, str]:
    """Two texts with marks on what the answer has too much and on what it lacks; without marks if both are long."""
    units, wanted = UNIT.findall(answer), UNIT.findall(expected)
    if len(units) * len(wanted) > MAX_COMPARED:
        return answer, expected
    first, second = [], []
    for kind, start, end, its_start, its_end in SequenceMatcher(None, units, wanted, autojunk=False).get_opcodes():
        extra, missing = "".join(units[start:end]), "".join(wanted[its_start:its_end])
        if kind != "equal":
            extra = extra and Markup('<mark class="extra">{}</mark>').format(extra)
            missing = missing and Markup('<mark class="missing">{}</mark>').format(missing)
        first.append(extra)
        second.append(missing)
    return Markup().join(first), Markup().join(second)  # which escape what is not Markup
