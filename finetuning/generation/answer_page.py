"""The answers to a data file as one HTML page without network: questions, answers, and what is wrong in them."""

import base64
import hashlib
import re
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

from finetuning.generation.generate import without_answer
from finetuning.generation.metrics import by_task
from finetuning.preprocessing.rows import expected_answer

# What a difference is made of: a word of an alphabet or a number; else a character, as in Chinese.
UNIT = re.compile(r"[0-9A-Za-z\u00c0-\u024f\u0370-\u052f]+|.", re.DOTALL)
MOST_COMPARED = 2_000_000  # pairs of units; the time of a comparison grows with them

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --page: #fff; --card: #f6f8fa; --line: #d1d9e0;
  --right: #1a7f37; --wrong: #c21f28; --extra: #ffd7d5; --missing: #c9f2d3; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22;
  --line: #3d444d; --right: #3fb950; --wrong: #ff7b72; --extra: #67232a; --missing: #14532d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 50rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0; }
form { position: sticky; top: 0; background: var(--page); padding: .6rem 0; display: flex; flex-wrap: wrap;
  gap: .4rem 1rem; align-items: center; border-bottom: 1px solid var(--line); }
select { font: inherit; max-width: 100%; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem;
  margin: .8rem 0; }
article[hidden] { display: none; }
h2, h3 { font-size: .85rem; font-weight: normal; color: var(--soft); margin: .5rem 0 0; }
h2 { margin: 0; }
p { margin: 0; white-space: pre-wrap; }
pre { overflow-x: auto; font-size: .85rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
mark { color: inherit; border-radius: 2px; }
.extra { background: var(--extra); text-decoration: line-through; }
.missing { background: var(--missing); text-decoration: underline; }
"""
SCRIPT = """
const task = document.getElementById("task"), wrong = document.getElementById("wrong");
function filter() {
  let shown = 0;
  for (const row of document.querySelectorAll("article")) {
    row.hidden = (task.value && row.dataset.task !== task.value) || (wrong.checked && row.dataset.verdict !== "wrong");
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = shown + " shown";
}
task.onchange = wrong.onchange = filter;
filter();
"""
# Even if a text were not escaped, only the script of this page would run, and nothing would be loaded.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p class="source">{source}</p>
{scores}
<form>
<label>task <select id="task"><option value="">all</option>{options}</select></label>
<label><input type="checkbox" id="wrong"> only wrong answers</label>
<output id="shown"></output>
</form>
<main>
{articles}
</main>
<script>{script}</script>
</html>
"""


def write_page(
    file: str, rows: list[dict[str, Any]], predictions: list[dict[str, Any]], scores: str, **sources: str | None
) -> None:
    """Write the page.

    Args:
        predictions: for each row `prediction`, and perhaps `thought`, `cut` and `probabilities`.
        scores: as Markdown; "" if there are none.
        sources: what the answers come from, to be shown by name.
    """
    verdicts = [judge(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
    tasks = by_task(rows)
    task_of = {number: place for place, numbers in enumerate(tasks.values()) for number in numbers}
    articles = [
        make_article(number, task_of[number - 1], list(tasks)[task_of[number - 1]], *rest)
        for number, rest in enumerate(zip(rows, predictions, verdicts, strict=True), 1)
    ]
    source = ", ".join(f"{name} {value}" for name, value in sources.items() if value)
    text = PAGE.format(
        title=f"{len(rows):,} answers: {verdicts.count('right'):,} right, {verdicts.count('wrong'):,} wrong",
        source=escape(source),
        scores=f"<details><summary>scores</summary><pre>{escape(scores)}</pre></details>" if scores else "",
        options="".join(f'<option value="{place}">{escape(task)}</option>' for place, task in enumerate(tasks)),
        articles="\n".join(articles),
        style=STYLE,
        script=SCRIPT,
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8", errors="replace")


def judge(row: dict[str, Any], prediction: dict[str, Any]) -> str:
    """Call an answer right or wrong, ignoring white space around it as the scores do; open if there is nothing to
    compare it with."""
    expected = expected_answer(row)
    if expected is None:
        return "open"
    return "right" if prediction["prediction"].strip() == expected.strip() else "wrong"


def make_article(
    number: int, task_number: int, task: str, row: dict[str, Any], prediction: dict[str, Any], verdict: str
) -> str:
    answer = prediction["prediction"]
    head = [f"row {number:,}", escape(task)]
    if verdict != "open":
        head.append(f'<span class="{verdict}">{verdict}</span>')
    if "probabilities" in prediction:
        head.append(f"probability {prediction['probabilities'][answer]:.4f}")
    if prediction.get("cut"):
        head.append("cut before its end")
    parts = [(name, escape(text)) for name, text in list_turns(without_answer(row))]
    if prediction.get("thought"):
        parts.append(("thought", escape(prediction["thought"])))
    if verdict == "wrong":
        parts += zip(("answer", "right answer"), mark_difference(answer, expected_answer(row)), strict=True)
    else:
        parts.append(("answer", escape(answer)))
    body = "".join(f'<h3>{escape(name)}</h3><p dir="auto">{text}</p>' for name, text in parts)
    return f'<article data-task="{task_number}" data-verdict="{verdict}"><h2>{" · ".join(head)}</h2>{body}</article>'


def list_turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Who says what in a row without its answer."""
    if "messages" in row:
        return [(message["role"], message["content"]) for message in row["messages"]]
    turns = [("system", row["system"])] if row.get("system") else []
    for asked, answered in row.get("history") or []:
        turns += [("user", asked), ("assistant", answered)]
    turns.append(("instruction", row["instruction"]))
    return turns + ([("input", row["input"])] if row.get("input") else [])


def mark_difference(answer: str, expected: str) -> tuple[str, str]:
    """Two texts as HTML, with marks on what the answer has too much and on what it lacks."""
    units, wanted = UNIT.findall(answer), UNIT.findall(expected)
    if len(units) * len(wanted) > MOST_COMPARED:
        return escape(answer), escape(expected)
    first, second = [], []
    for kind, start, end, its_start, its_end in SequenceMatcher(None, units, wanted, autojunk=False).get_opcodes():
        one, other = escape("".join(units[start:end])), escape("".join(wanted[its_start:its_end]))
        if kind != "equal":
            one = f'<mark class="extra">{one}</mark>' if one else ""
            other = f'<mark class="missing">{other}</mark>' if other else ""
        first.append(one)
        second.append(other)
    return "".join(first), "".join(second)
