"""The model card: README.md beside the adapter, in the form that the Hugging Face hub reads."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from finetuning.adapter.folder import TEMPLATE

TITLES = {"LORA": "LoRA adapter", "PROMPT_TUNING": "Soft prompt"}
TAGS = {"LORA": "lora", "PROMPT_TUNING": "prompt-tuning"}
# A question in each prompt format, and the lines that turn it into the model's input.
PLAIN = r"""inputs = tokenizer("Instruction: 翻译为英文\nInput: 早安", return_tensors="pt")"""
CHAT = """tokenizer.chat_template = open({template}, encoding="utf-8").read()
messages = [{{"role": "user", "content": "翻译为英文\\n早安"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
SNIPPET = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {adapter})
model.half()
{inputs}
outputs = model.generate(**inputs)
print(tokenizer.decode(outputs[0]))"""


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
    share = 100 * report["trainable_parameters"] / report["parameters"]
    name = base if on_hub else Path(base).name
    sections = [
        f"# {TITLES[method]} for {name}",
        f"{report['trainable_parameters']:,} trained parameters, {share:.4f}% of {report['parameters']:,}. "
        f"Base model: `{base}`{'' if on_hub else ' (a folder: add `base_model` above before you publish this)'}.",
        "## How it was made",
        block("bash", report["command"]),
        facts(report),
    ]
    if picture:
        sections.append(f"![training loss, evaluation loss and learning rate against the steps]({picture})")
    if scores:
        evaluated = report["metrics"]
        sections += ["## Scores", f"On the {evaluated['rows']:,} rows of `{evaluated['data_path']}`:", scores]
    sections += ["## Use it", block("python", loading(report, adapter)), *commands(report, adapter)]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def facts(report: dict[str, Any]) -> str:
    """The run in a table: data, settings, last losses, speed and versions."""
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
    return "\n".join(["| | |", "|---|---|"] + [f"| {name} | {cell(value)} |" for name, value in rows.items()])


def loading(report: dict[str, Any], adapter: str) -> str:
    template, base = Path(adapter, TEMPLATE).as_posix(), report["settings"]["model_path"]
    inputs = PLAIN if report["prompt_format"] == "plain" else CHAT.format(template=quote(template))
    return SNIPPET.format(base=quote(base), adapter=quote(adapter), inputs=inputs)


def quote(text: str) -> str:
    """A text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def commands(report: dict[str, Any], adapter: str) -> list[str]:
    """How to ask the adapter, to serve it, and in which format."""
    folder = shlex.quote(adapter)
    wording = {
        "plain": "`plain`: a line `Instruction: ...`, a line `Input: ...` unless the input is empty; the answer comes "
        "after `Output: `.",
        "chat": "`chat`: the base model's chat template, instruction and input in one turn of the user.",
    }
    mode = " The model thinks before it answers." if report["thinking"] else ""
    return [
        "Or, with the repository that trained it:",
        block("bash", f'python inference.py --adapter_path {folder} --instruction "翻译为英文" --input "早安"'),
        "To serve it, make one plain checkpoint of base model and adapter:",
        block(
            "bash", f"python merge_adapter.py --adapter_path {folder} --output_dir {shlex.quote(adapter + '-merged')}"
        ),
        f"**Prompt format**, {wording[report['prompt_format']]}{mode} Other programs read it from "
        "`chat_template.jinja`, which lies beside the adapter.",
    ]


def block(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def cell(text: str) -> str:
    """A text that cannot break out of its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
