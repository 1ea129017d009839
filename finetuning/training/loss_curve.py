"""The picture of a run: training and evaluation loss against the steps, and the learning rate."""

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#1f6feb", "#d1570a", "#6e7781"
FEW = 40  # points; each gets a dot of its own


def draw_losses(history: list[dict[str, Any]], file: Path) -> None:
    """Draw a picture of 640 x 360 points, on white so that it can be read on any page.

    Args:
        history: from `report.merge_log`.
    """
    from matplotlib import style  # here because training itself does not need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    def points(name: str) -> tuple[list[int], list[float]]:
        found = [entry for entry in history if entry.get(name) is not None]
        return [entry["step"] for entry in found], [entry[name] for entry in found]

    with style.context("default"):  # whatever the user's own style is
        figure = Figure(figsize=(6.4, 3.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for name, title, colour in (("loss", "training loss", BLUE), ("eval_loss", "evaluation loss", ORANGE)):
            steps, losses = points(name)
            if steps:
                marker = "o" if len(steps) <= FEW or name == "eval_loss" else ""
                axes.plot(steps, losses, color=colour, label=title, marker=marker, markersize=3, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

        rates = axes.twinx()
        rates.plot(*points("learning_rate"), color=GREY, label="learning rate", linewidth=0.9, linestyle="--")
        rates.set_ylim(bottom=0)
        rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rates.tick_params(axis="y", colors=GREY, labelsize=8)
        rates.yaxis.get_offset_text().set(color=GREY, size=8)
        rates.spines[["top", "left", "bottom"]].set_visible(False)
        rates.spines["right"].set_color(GREY)

        lines = axes.get_lines() + rates.get_lines()
        titles = [line.get_label() for line in lines]
        figure.legend(lines, titles, frameon=False, loc="outside upper center", ncols=3)
        figure.savefig(file, dpi=200)
