"""benchmark.py: the table, its JSON, and a refusal to compare runs with different losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, Run
from transformers import AutoModelForCausalLM

import benchmark
from benchmark import BenchmarkArguments
from finetuning.benchmarking.shapes import SHAPES, make_config, make_random_checkpoint
from finetuning.benchmarking.table import METHODS, check_losses


@pytest.mark.slow
def test_table_and_json(tmp_path: Path) -> None:
    """Four of the methods on tiny-qwen; the flattened and the padded run have one loss."""
    words = "--warmup_steps 1 --steps 2 --methods full,lora,lora_stock,prompt_tuning_4bit"
    command = [sys.executable, "benchmark.py", *words.split(), "--output_dir", str(tmp_path / "out")]
    options = {"cwd": REPOSITORY, "env": os.environ | {"PYTHONUTF8": "1"}, "encoding": "utf-8"}
    result = subprocess.run(command, capture_output=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["model"] == "models/tiny-qwen" and saved["matrix_product_rate"] > 0
    results = saved["results"]
    assert list(results) == ["full", "lora", "lora_stock", "prompt_tuning_4bit"]
    total, adapter = results["full"]["trainable"], results["lora"]["trainable"]
    assert results["full"]["trainable_percent"] == 100 and adapter == 4 * 8 * (3 * 192 + 192 + 2 * 96)
    assert results["lora"]["trainable_percent"] == pytest.approx(100 * adapter / (total + adapter))
    assert results["prompt_tuning_4bit"]["trainable"] == 20 * 192
    assert results["prompt_tuning_4bit"]["precision"] == "nf4"
    for figures in results.values():
        assert len(figures["losses"]) == 3 and 0.5 < figures["losses"][0] < 9
        assert 0.3 < figures["peak_gib"] < 10 and figures["steps"] == 2
        assert 0 < figures["supervised_tokens"] < 0.6 * figures["tokens"]
    assert results["lora"]["losses"] == pytest.approx(results["lora_stock"]["losses"], abs=1e-4)
    assert results["lora"]["losses"][0] == pytest.approx(results["full"]["losses"][0], abs=1e-4)
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 6 and "| 1.00 |" in table[2] and "| LoRA, stock Trainer, padded | float32 |" in table[4]
    assert (tmp_path / "out/benchmark.png").read_bytes().startswith(b"\x89PNG")


PARAMETERS = {  # of the released models
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_released_models(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape))
    assert model.num_parameters() == PARAMETERS[shape]


def test_random_checkpoint_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES["qwen3-0.6b"], "vocab_size", 5000)
    args = BenchmarkArguments(sequence_length=12, batch_size=2, warmup_steps=1, steps=3, only="lora")
    make_random_checkpoint("qwen3-0.6b", 1, str(tmp_path))
    figures = benchmark.measure(args, str(tmp_path))
    assert figures["trainable"] == 8 * (3 * 1024 + (16 + 8 + 8) * 128)
    assert len(figures["losses"]) == 4 and 7 < figures["losses"][0] < 12
    assert figures["tokens"] == 3 * 2 * 12 and figures["supervised_tokens"] == 3 * 2 * 11  # all but a row's first


def losses(*values: float, precision: str = "float32") -> dict[str, object]:
    return {"losses": list(values), "precision": precision}


def test_runs_with_other_losses_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    check_losses({"lora": losses(3.0, 2.0), "lora_stock": losses(3.0, 2.00005), "full": losses(3.0, 1.0)})
    check_losses({"lora": losses(3.0, precision="float16"), "lora_trl": losses(3.01, precision="float16")})
    check_losses({"prompt_tuning": losses(4.0), "full": losses(3.0), "lora_4bit": losses(3.1, precision="nf4")})
    for bad in (
        {"lora": losses(3.0, 2.0), "lora_stock": losses(3.0, 2.001)},
        {"lora": losses(3.0), "lora_trl": losses(float("nan"))},
        {"lora": losses(3.0), "full": losses(3.1)},
    ):
        with pytest.raises(SystemExit) as stop:
            check_losses(bad)
        assert stop.value.code == 1 and "cannot be compared" in capsys.readouterr().err


BAD_FLAGS = {
    "shape": (["--shape", "qwen9"], "qwen2.5-7b"),
    "method": (["--methods", "lora,dora"], "--methods dora"),
    "layers": (["--layers", "2"], "--shape"),
    "steps": (["--steps", "0"], "--steps"),
    "model": (["--model_path", "no/such/model"], "does not exist"),
}


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_mistakes(run_main: Run, flags: list[str], words: str) -> None:
    assert words in run_main(benchmark, *flags, expected=2)


def test_methods_are_the_five_of_the_table() -> None:
    assert list(METHODS) == ["full", "lora", "lora_4bit", "prompt_tuning", "prompt_tuning_4bit"]
