"""How good answers are: exact match and chrF, for each task and for all rows together."""

from typing import Any


def score(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, float]]:
    """Compare answers with the rows' outputs.

    Args:
        rows: hold `output`, and may hold `task`, by which they are grouped.
        answers: one for each row.

    Returns:
        For each task in order of appearance, and for "all": `rows` (a count), `exact_match` (percent of answers that
        equal the output, white space around them left out) and `chrf` (sacrebleu's corpus chrF2, 0 to 100).
    """
    from sacrebleu import corpus_chrf  # training does not need it

    groups: dict[str, list[tuple[str, str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        groups.setdefault(str(row.get("task", "rows")), []).append((answer.strip(), row["output"].strip()))
    if len(groups) > 1:
        groups["all"] = [pair for pairs in groups.values() for pair in pairs]
    return {
        task: {
            "rows": len(pairs),
            "exact_match": 100 * sum(answer == output for answer, output in pairs) / len(pairs),
            "chrf": corpus_chrf([answer for answer, _ in pairs], [[output for _, output in pairs]]).score,
        }
        for task, pairs in groups.items()
    }


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    """A Markdown table of what `score` returns."""
    lines = ["| task | rows | exact match | chrF |", "|---|--:|--:|--:|"]
    lines += [
        f"| {task} | {values['rows']} | {values['exact_match']:.1f}% | {values['chrf']:.1f} |"
        for task, values in scores.items()
    ]
    return "\n".join(lines)
