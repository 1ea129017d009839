"""Whole runs that differ in how a step is computed, and train the same.

With plain gradient descent and no clipping, the change of the weights is the sum of the gradients: they are compared.
"""

import json
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
from support import FLAT, Run, difference, make_model, make_tokenizer, save_checkpoint

import train_lora
import train_prompt_tuning

SCRIPTS = [train_lora, train_prompt_tuning]
DESCENT = "--optim sgd --max_grad_norm 0 --learning_rate 0.1 --max_steps 4 --logging_steps 1 --eval_metrics False"
FAMILIES = [pytest.param(name, marks=[] if name == "qwen2" else pytest.mark.slow) for name in FLAT]


def train(run_main: Run, script: ModuleType, flags: list[str], base: str, out: Path, *more: object) -> list[float]:
    """Train four steps, of two epochs; returns their losses and gradient norms."""
    method = ["--lora_dropout", 0] if script is train_lora else []
    run_main(script, *flags, *DESCENT.split(), *method, "--model_path", base, "--output_dir", out, *more)
    history = json.loads((out / "training_report.json").read_text(encoding="utf-8"))["history"]
    assert len(history) == 4 and history[3]["loss"] < history[1]["loss"] - 0.01
    return [entry[name] for entry in history for name in ("loss", "grad_norm")]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5_text"])
def test_any_division_of_a_step(
    run_main: Run, flags: list[str], tmp_path: Path, script: ModuleType, model_type: str
) -> None:
    """Eight rows at once, or in two or eight parts; an epoch of twelve rows ends with a smaller step. To 1e-5."""
    base, found = save_checkpoint(tmp_path / "base", make_tokenizer(), make_model(model_type)), []
    for rows, parts in ((8, 1), (2, 4), (1, 8)):
        sizes = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", parts]
        found.append(train(run_main, script, flags, base, tmp_path / str(rows), *sizes))
    for rows, values in ((2, found[1]), (1, found[2])):
        assert values == pytest.approx(found[0], rel=0, abs=1e-5)
        assert difference(tmp_path / "8", tmp_path / str(rows)) < 1e-5


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_flattened_equals_padded(
    run_main: Run,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: ModuleType,
    model_type: str,
) -> None:
    """Losses, gradient norms and adapters, to 1e-5."""
    base = save_checkpoint(tmp_path / "base", make_tokenizer(), make_model(model_type))
    more = ["--train_sampling_strategy", "sequential"]
    flat = train(run_main, script, flags, base, tmp_path / "flat", *more)
    refuse = Mock(return_value=False)
    monkeypatch.setattr("finetuning.training.trainer.can_flatten", refuse)
    assert train(run_main, script, flags, base, tmp_path / "padded", *more) == pytest.approx(flat, rel=0, abs=1e-5)
    assert difference(tmp_path / "flat", tmp_path / "padded") < 1e-5 and refuse.called
