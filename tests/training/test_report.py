"""What lies beside an adapter: the report of its run, the picture of its losses, and its model card."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import matplotlib
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from support import STEP, Run, StopAt, make_model, make_tokenizer, save_checkpoint

import inference
import train_lora
import train_prompt_tuning
from finetuning.cli.arguments import ScriptParser
from finetuning.cli.commands import resume_command
from finetuning.training import report
from finetuning.training.report import draw_losses, merge_log
from merge_adapter import MergeArguments


@pytest.fixture
def run(run_main: Run) -> Run:
    return partial(run_main, train_lora, "--logging_steps", 1)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "training_report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_rows_beyond_the_positions(capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 98: counted. YaRN multiplies the positions, and its spelling in config.json leaves the first number."""
    lengths = Dataset.from_dict({"length": [512, 513, 600]})
    report.warn_about_positions(lengths, make_model().config)
    assert "2 examples are longer than the 512 tokens" in capsys.readouterr().err
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    report.warn_about_positions(lengths, make_model(rope_parameters=yarn).config)
    assert not capsys.readouterr().err


def test_report_is_that_of_the_run(run: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    """Its losses are the printed ones, and its counts, settings and hash are those of the other files."""
    printed = run(*flags, "--eval_split", 0.25, "--eval_metrics", False, "--lora_r", 4)
    found, info = read_report(tmp_path / "out"), json.loads((tmp_path / "out/adapter_info.json").read_text("utf-8"))
    assert {name: found[name] for name in ("command", "versions", "base_model")} == {
        name: info[name] for name in ("command", "versions", "base_model")
    }
    assert found["data"]["sha256"] == info["data_sha256"] and found["data"]["path"] == rows_path
    assert (found["data"]["rows"], found["trained_on_examples"]) == (12, 9)
    assert found["evaluated_on"] == {"eval_split": 0.25, "examples": 3}
    trainable = re.search("trainable +([\\d,]+) of ([\\d,]+)", printed).groups()
    assert trainable == (f"{found['trainable_parameters']:,}", f"{found['parameters']:,}")
    assert found["settings"]["lora_r"] == 4 and found["settings"]["learning_rate"] == 3e-4
    assert (found["method"], found["steps"], found["resumed_at_step"]) == ("LORA", 6, 0)
    lines = [line.split() for line in printed.splitlines() if STEP.match(line)]
    evaluated = re.findall(r"^ +\S+ +\S+ +(\S+)  evaluation", printed, re.MULTILINE)
    for column, name in enumerate(("loss", "grad_norm", "learning_rate", "eval_loss"), 2):
        logged = evaluated if name == "eval_loss" else [line[column] for line in lines]
        kept = [entry[name] for entry in found["history"] if name in entry]
        assert kept == pytest.approx(list(map(float, logged)), rel=1e-2) and len(kept) == (
            2 if name == "eval_loss" else 6
        ), name
    assert [entry["step"] for entry in found["history"]] == [1, 2, 3, 4, 5, 6]
    assert found["metrics"] is None and not (tmp_path / "out/metrics.json").exists()


def test_report_of_a_resumed_run_covers_all_steps(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags, "--save_steps", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.StopOnSignal", lambda: StopAt(3))
        run(*flags)
    run(*flags, "--resume_from_checkpoint", True)
    resumed = read_report(tmp_path / "out")
    run(*flags, "--overwrite_output_dir", True)
    whole = read_report(tmp_path / "out")
    assert resumed["history"] == whole["history"] and len(whole["history"]) == 6
    assert (resumed["resumed_at_step"], whole["resumed_at_step"]) == (3, 0)
    assert "since step 3" in report.make_model_card(resumed, "out", "", None)
    assert "since step" not in report.make_model_card(whole, "out", "", None)


def test_log_of_overflows_stays_json() -> None:
    log = [
        {"loss": 2.0, "grad_norm": math.inf, "learning_rate": 1e-3, "epoch": 0.5, "step": 1},
        {"eval_loss": 1.5, "eval_runtime": 3.0, "epoch": 0.5, "step": 1},
        {"train_runtime": 9.0, "train_loss": 7.0, "epoch": 1.0, "step": 2},
    ]
    together = {"step": 1, "epoch": 0.5, "loss": 2.0, "eval_loss": 1.5, "learning_rate": 1e-3, "grad_norm": None}
    assert merge_log(log) == [together]


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
@pytest.mark.parametrize("format_name", ["plain", "chat"])
def test_card_is_true(
    run_main: Run,
    flags: list[str],
    rows_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: ModuleType,
    format_name: str,
) -> None:
    """The hub can read it; the command in it made the adapter; its scores are printed ones; its code runs."""
    eos = "<|im_end|>" if format_name == "chat" else "<|endoftext|>"
    model = save_checkpoint(tmp_path / "base", make_tokenizer(eos), make_model())
    flags = [*flags, "--model_path", model, "--eval_data_path", rows_path]
    printed = run_main(script, *flags)
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"lora" if script is train_lora else "prompt-tuning", "qwen"} == set(card.data.tags)
    assert card.data.base_model is None  # a folder of this machine, which the hub refuses as a name
    found = read_report(folder)
    assert f"{found['trainable_parameters']:,} trained" in card.text and found["data"]["sha256"] in card.text
    assert "](loss.png)" in card.text and "on the 12 rows" in card.text.lower()
    table = card.text[card.text.index("| task |") : card.text.index("## Use it")].strip()
    assert table in printed and found["metrics"]["scores"]["rows"]["rows"] == 12
    assert card.data.model_name == "out" and {result.dataset_config for result in card.data.eval_results} == {"rows"}
    values = found["metrics"]["scores"]["rows"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {"exact_match": "exact_match", "sacrebleu": "bleu", "chrf": "chrf"}
    assert results == {name: round(values[ours], 2) for name, ours in expected.items()}
    if script is train_prompt_tuning:
        assert found["settings"]["num_virtual_tokens"] == 15

    made, asked, merged = (shlex.split(text)[2:] for text in re.findall(r"```bash\n(.*?)\n```", card.text, re.DOTALL))
    assert made == flags
    run_main(inference, *asked, "--max_new_tokens", 2)
    monkeypatch.setattr("sys.argv", ["merge_adapter.py", *merged])
    assert ScriptParser((MergeArguments,), None).parse()[0].adapter_path == str(folder)
    [code] = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    exec(code, {})
    beginning = "Instruction: 翻译" if format_name == "plain" else "<|im_start|>user\n翻译"
    assert capsys.readouterr().out.split("Be kind.<|im_end|>\n")[-1].startswith(beginning)


def test_card_names_a_base_model_of_the_hub(trained: Callable[..., Path]) -> None:
    found = read_report(trained(train_lora))
    found["settings"]["model_path"] = "Qwen/Qwen2.5-7B"
    found["command"] = "python train_lora.py --note '```'"
    card = ModelCard(report.make_model_card(found, 'my "own" adapter', "", None))
    assert card.data.base_model == "Qwen/Qwen2.5-7B" and "before you publish" not in card.text
    assert "Scores" not in card.text and "loss.png" not in card.text
    assert f"````bash\n{found['command']}\n````" in card.text
    compile(re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)[0], "card", "exec")


def test_results_on_the_hub(trained: Callable[..., Path]) -> None:
    """Its readers find each task with its own metrics, by the hub's names."""
    found = read_report(trained(train_lora))
    texts = {"rows": 2, "exact_match": 50.0, "bleu": 12.3456, "chrf": 30.0, "bleu_tokenizer": "zh"}
    words = {
        "rows": 2,
        "exact_match": 50.0,
        "accuracy": 75.0,
        "macro_f1": 60.0,
        "labels": ["a"],
        "confusion_matrix": [],
    }
    found["metrics"] = {"data_path": "my data/test.json", "rows": 4, "scores": {"say": texts, "sort: it": words}}
    results = ModelCard(report.make_model_card(found, "out/lora", "| table |", None)).data.eval_results
    kinds = {("say", "text-generation"), ("sort: it", "text-classification")}
    assert {(result.dataset_config, result.task_type) for result in results} == kinds
    assert [(result.metric_type, result.metric_value) for result in results] == [
        *(("exact_match", 50.0), ("sacrebleu", 12.35), ("chrf", 30.0)),
        *(("exact_match", 50.0), ("accuracy", 75.0), ("f1", 60.0)),
    ]
    assert {result.dataset_type for result in results} == {"test"}


def test_no_token_is_published(run: Run, flags: list[str], tmp_path: Path) -> None:
    for words in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        run(*flags, *words, "--overwrite_output_dir", True)
        for path in (tmp_path / "out").iterdir():
            assert b"hf_secret" not in path.read_bytes(), path.name
        assert "--hub_token ... --overwrite_output_dir True" in read_report(tmp_path / "out")["command"]
        assert resume_command().endswith("--hub_token ... --resume_from_checkpoint True")


@pytest.mark.parametrize("broken", ["draw_losses", "make_model_card", "REPEATED"])
def test_adapter_outlives_its_report(
    flags: list[str],
    trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    """A full disk, a broken matplotlib: the run ends as usual, and nothing of an earlier run stays."""
    shutil.copytree(trained(train_lora), tmp_path / "out")
    before = (tmp_path / "out/README.md").read_bytes()
    failure = ["no such field"] if broken == "REPEATED" else Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(report, broken, failure)
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["train_lora.py", *flags, "--seed", "7", "--overwrite_output_dir", "True"])
        train_lora.main()
    captured = capsys.readouterr()
    assert "could not be written; all else is saved" in captured.err and "Try it:" in captured.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names
    assert ("loss.png" in names, "training_report.json" in names) == (broken != "draw_losses", broken != "REPEATED")
    assert ("README.md" in names) == (broken == "draw_losses")
    assert broken != "draw_losses" or (tmp_path / "out/README.md").read_bytes() != before


def test_report_of_a_run_whose_evaluation_was_stopped(
    run: Run, flags: list[str], rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--eval_data_path", rows_path)
    assert read_report(tmp_path / "out")["metrics"] is None
    assert "## Scores" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_without_matplotlib(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's shortest pip command does not install it."""
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr("sys.argv", ["train_lora.py", *flags])
    train_lora.main()
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "loss.png" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("points", [1, 3, 500])
def test_picture(tmp_path: Path, points: int) -> None:
    """Dark lines on white, whatever the user's own style; the evaluation loss is drawn if there is one."""
    history = [{"step": n, "loss": 2 / n, "learning_rate": 1e-3 / n, "grad_norm": None} for n in range(1, points + 1)]
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.facecolor": "black", "text.color": "white"}):
        draw_losses(history, tmp_path / "one.png")
    draw_losses([*history, {"step": points, "eval_loss": 1.0}], tmp_path / "two.png")
    orange = []
    for name in ("one", "two"):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert picture.size == (1280, 720)
        colours = {colour: count for count, colour in picture.getcolors(1 << 20)}
        assert colours[(255, 255, 255)] > 0.8 * 1280 * 720
        orange.append((0xD1, 0x57, 0x0A) in colours)
    assert orange == [False, True]
