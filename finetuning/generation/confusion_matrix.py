"""The confusion matrices of a data file's tasks as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from finetuning.cli.console import warn

MOST_DRAWN = 40  # labels; a larger matrix is only in the file of the scores
# Parts of the file names of fonts that have Chinese characters; matplotlib's own has none.
CHINESE_FONTS = ("cjk", "sourcehan", "pingfang", "hiragino", "heiti", "msyh", "simhei", "wqy", "arial unicode")


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

    tasks = {task: values for task, values in scores.items() if 0 < len(values.get("labels", ())) <= MOST_DRAWN}
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
                names, matrix = [*names, "(other)"], [*matrix, [0] * len(matrix[0])]
            else:
                matrix = [counts[:-1] for counts in matrix]
            picture = ConfusionMatrixDisplay(np.array(matrix), display_labels=names)
            picture.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
            axes.set(title=f"task {place}" if numbered else task, xlabel="answer", ylabel="right answer")
        figure.savefig(file, dpi=130)
