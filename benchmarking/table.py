"""The measured methods side by side: a table, a picture, and a check that they may be compared."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarking.pages import write_table
from finetuning.cli.console import fail, say, warn
from finetuning.generation.metrics import format_table

LARGEST_DIFFERENCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}  # of a step's loss
HALF_PRECISION_STEPS = 3  # whose losses are compared: tiny differences of half-precision runs grow with the steps


class Method(NamedTuple):
    title: str
    kind: str  # full, lora or prompt_tuning
    load_in_4bit: bool = False
    trainer: str = "ours"  # or stock or trl


METHODS = {
    "full": Method("full fine-tuning", "full"),
    "lora": Method("LoRA", "lora"),
    "lora_4bit": Method("LoRA, 4-bit", "lora", load_in_4bit=True),
    "prompt_tuning": Method("prompt tuning", "prompt_tuning"),
    "prompt_tuning_4bit": Method("prompt tuning, 4-bit", "prompt_tuning", load_in_4bit=True),
}
# The same adapters, trained by other code.
BASELINES = {
    "lora_stock": Method("LoRA, stock Trainer, padded", "lora", trainer="stock"),
    "prompt_tuning_stock": Method("prompt tuning, stock Trainer, padded", "prompt_tuning", trainer="stock"),
    "lora_trl": Method("LoRA, TRL SFTTrainer", "lora", trainer="trl"),
}
ALL = METHODS | BASELINES


def choose_methods(names: str, baseline: bool) -> list[str]:
    """The named methods, with commas between, and the baselines if asked for; without TRL's if it is not installed."""
    methods = names.split(",")
    methods += [name for name in BASELINES if baseline and name not in methods]
    if "lora_trl" in methods and not find_spec("trl"):
        methods.remove("lora_trl")
        warn("TRL is not installed, so it is left out: pip install trl")
    return methods


def check_losses(results: dict[str, dict[str, Any]]) -> None:
    """Refuse to compare a baseline whose losses differ from ours, or full fine-tuning whose first loss does."""
    pairs = [(name, BASELINES[name].kind, None) for name in results if name in BASELINES]
    pairs += [("full", "lora", 1)] if "full" in results else []
    for name, other, count in pairs:
        if other not in results:
            continue
        tolerance = max(LARGEST_DIFFERENCE.get(results[key]["precision"], 2e-2) for key in (name, other))
        if tolerance > LARGEST_DIFFERENCE["float32"]:
            count = count or HALF_PRECISION_STEPS
        losses = (results[key]["losses"][:count] for key in (name, other))
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        if not difference <= tolerance:
            fail(f"{name} and {other} differ by {difference:.1e} in a step's loss: their speeds cannot be compared", 1)


def compare_methods(results: dict[str, dict[str, Any]], rate: float) -> str:
    """A Markdown table. Speeds are compared in seconds on a GPU, and in CPU seconds, which are steadier, without one;
    arithmetic with the `rate` of a matrix product, from `measure_machine`."""
    seconds, unit = ("seconds", "s / step") if torch.cuda.is_available() else ("cpu_seconds", "CPU s / step")
    columns = {
        "method": "{title}",
        "weights": "{precision}",
        "trainable": "{trainable:,}",
        "%": "{trainable_percent:.4f}",
        "peak GiB": "{peak_gib:.2f}",
        unit: "{seconds_of_step:.3f}",
        "tokens / s": "{tokens_per_second:,.0f}",
        "supervised / s": "{supervised_tokens_per_second:,.0f}",
        "of matmul rate": "{share:.0f}%",
        "speed": "{speed}",
    }
    rows = [list(columns)]
    for name, result in results.items():
        values = {"title": ALL[name].title, "seconds_of_step": result[seconds] / result["steps"]}
        values |= {"share": 100 * result["operations_per_second"] / rate}
        values |= {"speed": f"{results['full'][seconds] / result[seconds]:.2f}" if "full" in results else ""}
        rows.append([column.format(**result, **values) for column in columns.values()])
    return format_table(rows)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw bars of memory and speed."""
    from matplotlib.figure import Figure  # here because the table needs none

    names = [ALL[name].title for name in results]
    figure = Figure(figsize=(11, 1 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"peak_gib": "peak memory, GiB", "tokens_per_second": "tokens / s"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        bars = axis.barh(names, [result[key] for result in results.values()])
        axis.bar_label(bars, fmt="{:,.2f}" if key == "peak_gib" else "{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=150)


def save_results(output_dir: str, run: dict[str, Any], results: dict[str, Any], failures: dict[str, str]) -> None:
    """Write what has been measured so far as benchmark.json."""
    text = json.dumps(run | {"results": results, "failures": failures}, ensure_ascii=False, indent=2)
    Path(output_dir, "benchmark.json").write_text(text + "\n", encoding="utf-8")


def show_results(run: dict[str, Any], results: dict[str, dict[str, Any]], output_dir: str, pages: list[Path]) -> None:
    """Print the table of a run and, if its methods may be compared, write it into the pages, and draw it."""
    rate, rows = run["matrix_product_rate"], run["arguments"]["batch_size"]
    head = f"{run['model']} on {run['device']}, {rate / 1e12:.2f} TFLOP/s in a matrix product; {rows} rows a step"
    text = f"{head}\n\n{compare_methods(results, rate)}"
    say(f"\n{text}\n")
    check_losses(results)
    write_table(pages, "benchmark", text)
    if find_spec("matplotlib"):
        draw(results, Path(output_dir, "benchmark.png"))
    else:
        warn("no picture without matplotlib: pip install matplotlib")
