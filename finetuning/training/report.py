"""What a run tells: its first row; when it is done, what it took, on the screen and beside the adapter.

training_report.json    everything there is to know of the run
loss.png                its losses and learning rate
README.md               the model card
"""

import json
import math
import shlex
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader
from peft import PeftType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer

from finetuning.cli.console import attempt, describe_duration, fact, say, warn
from finetuning.cli.memory import GIB, peak_reserved
from finetuning.model.folder import CARD, CURVE, INFO, METRICS, REPORT, TEMPLATE
from finetuning.preprocessing.show import mark_answers
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import prompt_format
from finetuning.training.collators import row_lengths
from finetuning.training.flags import Arguments

BLUE, ORANGE, GREY = "#1f6feb", "#d1570a", "#6e7781"  # in the picture
FEW = 40  # points; each gets a dot of its own
LOGGED = ("epoch", "loss", "eval_loss", "learning_rate", "grad_norm")  # what the report keeps of the Trainer's log
# Fields of adapter_info.json that the report repeats, so that it can be read alone.
REPEATED = ("base_model", "quantization", "prompt_format", "thinking", "command", "versions")
# Fields of TrainingArguments that say how an adapter was trained.
SETTINGS = "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps world_size"
SETTINGS += " lr_scheduler_type warmup_steps optim weight_decay max_grad_norm gradient_checkpointing fp16 bf16 seed"


TITLES = {"LORA": "LoRA adapter", "PROMPT_TUNING": "Soft prompt"}
TAGS = {"LORA": "lora", "PROMPT_TUNING": "prompt-tuning"}
HUB_NAMES = {"macro_f1": "f1", "bleu": "sacrebleu"}  # of scores (https://hf.co/metrics), where they are not ours


def print_first_row(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    fact("format", f"{prompt_format(tokenizer)}; the first row:")
    say(mark_answers(dataset[0]["input_ids"], dataset[0]["labels"], tokenizer))


def warn_about_positions(dataset: Dataset, config: PreTrainedConfig) -> None:
    """Warn of examples that are longer than what the base model was made for, which YaRN multiplies."""
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0))
    limit = max(config.max_position_embeddings, stretched)
    count = sum(length > limit for length in row_lengths(dataset))
    if count:
        advice = f"there it answers badly; shorten them: --max_length {limit}"
        warn(f"{count:,} examples are longer than the {limit:,} tokens that the base model was made for: {advice}")


def print_run(run: dict[str, Any], output_dir: str) -> None:
    """Print what a run (from `describe_run`) took, how its losses changed, and where the adapter is."""
    speed = run["speed"]
    say(
        f"\ntrained in {describe_duration(speed['seconds'])}, {speed['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {speed['peak_memory_gib']:.2f} GiB"
    )
    for name, title in (("loss", "loss"), ("eval_loss", "loss of the evaluation")):
        values = [entry[name] for entry in run["history"] if entry.get(name) is not None]
        if len(values) > 1:
            say(f"{title}: {values[0]:.4f} -> {values[-1]:.4f}")
    say(f"saved in {output_dir}")


def merge_log(log: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """The Trainer's log with one entry for each step, and None for a value that is not finite, which JSON cannot hold.

    With fp16, the gradient norm is infinite at each step that is skipped while the loss scale comes down.
    """
    history: dict[int, dict[str, float | None]] = {}
    for entry in log:
        values = {name: entry[name] for name in LOGGED if name in entry}
        if values.keys() - {"epoch"}:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            history.setdefault(entry["step"], {"step": entry["step"]}).update(finite)
    return list(history.values())


def describe_run(
    trainer: Trainer, seconds: float, step_seconds: float, resumed_at: int, summary: Summary, args: Arguments
) -> dict[str, Any]:
    """What is known of a finished run, for training_report.json.

    Args:
        seconds: of all that happened in training.
        step_seconds: of the steps alone, which the speed is that of.
        resumed_at: the step of the checkpoint that the run was resumed from, or 0. The speed is of the steps since.
        summary: of the training data.
    """
    state, device = trainer.state, args.training.device
    tokens = sum(row_lengths(trainer.train_dataset)) * state.epoch * (1 - resumed_at / state.global_step)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    config = trainer.model.peft_config["default"]
    method = {name: value for name, value in vars(args.method).items() if value not in (None, False, "{}")}
    settings = {"model_path": args.model.model_path} | method
    if config.peft_type == PeftType.PROMPT_TUNING:
        settings["num_virtual_tokens"] = config.num_virtual_tokens  # also if the text gave it
    settings |= {name: getattr(args.training, name) for name in SETTINGS.split()}
    settings |= {"max_length": args.data.max_length}
    counts = {name: getattr(summary, name) for name in ("rows", "kept", "truncated", "dropped", "examples")}
    evaluated = {"eval_split": args.data.eval_split} if args.data.eval_split else {"path": args.data.eval_data_path}
    if trainer.eval_dataset:  # without the blank rows of `fill_up`, which have the number 0
        evaluated["examples"] = int(np.count_nonzero(trainer.eval_dataset.with_format("numpy")["row_number"][:]))
    return {
        "method": config.peft_type.value,
        "trainable_parameters": trainable,
        "parameters": total,
        "data": {"path": summary.path, "sha256": summary.sha256} | counts,
        "trained_on_examples": len(trainer.train_dataset),
        "evaluated_on": evaluated if trainer.eval_dataset else None,
        "settings": settings,
        "steps": state.global_step,
        "epochs": state.epoch,
        "resumed_at_step": resumed_at,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "speed": {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "tokens_per_second": tokens / (step_seconds or 1),  # a run that is resumed at its end takes no step
            "peak_memory_gib": peak_reserved(device) / GIB,
        },
        "history": merge_log(state.log_history),
    }


def write_report(run: dict[str, Any], scores: str, output_dir: str) -> None:
    """Write the report, the picture and the model card of a run beside its adapter. What fails only gives a warning."""
    folder = Path(output_dir)
    with attempt(REPORT):
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        repeated = {name: info[name] for name in REPEATED}
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8")) if (folder / METRICS).is_file() else None
        report = repeated | run | {"metrics": metrics}
        text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False, default=str)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    if find_spec("matplotlib"):
        with attempt(CURVE):
            draw_losses(run["history"], folder / CURVE)
    else:
        warn(f"no {CURVE} without matplotlib: pip install matplotlib")
    with attempt(CARD):
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        card = make_model_card(report, output_dir, scores, CURVE if (folder / CURVE).is_file() else None)
        (folder / CARD).write_text(card, encoding="utf-8")


def draw_losses(history: list[dict[str, Any]], file: Path) -> None:
    """Draw the losses and the learning rate against the steps, on white so that they can be read on any page."""
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
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
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


def make_model_card(report: dict[str, Any], adapter: str, scores: str, picture: str | None) -> str:
    """The text of an adapter's card. Every figure is one of the run's.

    Args:
        report: the contents of training_report.json.
        adapter: the folder, as the user named it.
        scores: on the evaluation rows, as Markdown; "" if there are none.
        picture: name of the file with the losses; None if there is none.
    """
    method, base = report["method"], report["settings"]["model_path"]
    results = hub_results(report["metrics"] or {})
    on_hub = not Path(base).is_dir()  # the hub refuses the name of a folder
    head = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[TAGS[method], "qwen"],
        model_name=Path(adapter).absolute().name if results else None,
        eval_results=results or None,
    )
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    environment.keep_trailing_newline = True
    environment.filters |= {
        "count": "{:,}".format,
        "cell": lambda text: " ".join(text.replace("|", "\\|").split()),  # of a table, which no text may break
        "quote": partial(json.dumps, ensure_ascii=False),  # for Python
        "shell": shlex.quote,
    }
    return environment.get_template("model_card.md.jinja").render(
        report=report,
        head=head.to_yaml(),
        title=TITLES[method],
        name=base if on_hub else Path(base).name,
        base=base,
        on_hub=on_hub,
        adapter=adapter,
        template=Path(adapter, TEMPLATE).as_posix(),
        scores=scores,
        picture=picture,
        fenced=fenced,
    )


def hub_results(metrics: dict[str, Any]) -> list[EvalResult]:
    """The scores of metrics.json, task by task, in the form in which the hub shows them beside a model."""
    return [
        EvalResult(
            task_type="text-classification" if "labels" in scores else "text-generation",
            dataset_type=Path(metrics["data_path"]).stem,
            dataset_name=f"{metrics['data_path']}, {task}",
            dataset_config=task,
            metric_type=HUB_NAMES.get(name, name),
            metric_name=f"{name} (0 to 100)",
            metric_value=round(value, 2),
        )
        for task, scores in metrics.get("scores", {}).items()
        for name, value in scores.items()
        if isinstance(value, float)
    ]


def fenced(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
