"""The model card: README.md beside the adapter, in the form that the Hugging Face hub reads."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader

from finetuning.model.folder import TEMPLATE

TITLES = {"LORA": "LoRA adapter", "PROMPT_TUNING": "Soft prompt"}
TAGS = {"LORA": "lora", "PROMPT_TUNING": "prompt-tuning"}


def make_model_card(report: dict[str, Any], adapter: str, scores: str, picture: str | None) -> str:
    """The text of an adapter's card. Every figure is one of the run's.

    Args:
        report: the contents of training_report.json.
        adapter: the folder, as the user named it.
        scores: on the evaluation rows, as Markdown; "" if there are none.
        picture: name of the file with the losses; None if there is none.
    """
    method, base = report["method"], report["settings"]["model_path"]
    on_hub = not Path(base).is_dir()  # the hub refuses the name of a folder
    head = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[TAGS[method], "qwen"],
    )
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    environment.keep_trailing_newline = True
    environment.filters |= {"quote": partial(json.dumps, ensure_ascii=False), "shell": shlex.quote}  # for Python, bash
    return environment.get_template("model_card.md.jinja").render(
        report=report,
        head=head.to_yaml(),
        title=TITLES[method],
        name=base if on_hub else Path(base).name,
        base=base,
        on_hub=on_hub,
        share=100 * report["trainable_parameters"] / report["parameters"],
        facts=describe_facts(report),
        adapter=adapter,
        template=Path(adapter, TEMPLATE).as_posix(),
        scores=scores,
        picture=picture,
        fenced=fenced,
    )


def describe_facts(report: dict[str, Any]) -> dict[str, str]:
    """Data, settings, last losses, speed and versions of a run, by name, as cells of a Markdown table."""
    data, settings, speed, history = (report[name] for name in ("data", "settings", "speed", "history"))
    counts = (
        f"{data['rows']:,} rows: {data['kept']:,} kept, {data['truncated']:,} truncated, {data['dropped']:,} dropped"
    )
    rows = {
        "data": f"`{data['path']}`, {counts}; trained on {report['trained_on_examples']:,} examples",
        "SHA-256 of the data": f"`{data['sha256']}`",
        "length": f"{report['steps']:,} steps, {report['epochs']:.4g} epochs",
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if name != "model_path"),
        "base weights": report["quantization"] or "not quantised",
    }
    for name, title in (("loss", "last training loss"), ("eval_loss", "last evaluation loss")):
        values = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
        if values:
            rows[title] = f"{values[-1][1]:.4f} (step {values[-1][0]:,})"
    since = f" since step {report['resumed_at_step']:,}, where it was resumed" if report["resumed_at_step"] else ""
    rows["time"] = f"{speed['seconds']:.0f} s{since}, {speed['tokens_per_second']:,.0f} tokens/s on {report['device']}"
    rows["peak memory"] = f"{speed['peak_memory_gib']:.2f} GiB"
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    # no text may break out of its cell
    return {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}


def fenced(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
