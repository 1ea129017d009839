"""benchmark.py: the table, its JSON, and that runs which are not the same are not compared."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import benchmark
from benchmark import METHODS, check_losses

Run = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[1]


def test_table_and_json(tmp_path: Path) -> None:
    """A released shape, cut to one layer, with random rows; the flattened and the padded run have one loss."""
    words = "--shape qwen3-0.6b --layers 1 --sequence_length 12 --batch_size 2 --warmup_steps 1 --steps 2 "
    words += f"--methods full,lora,lora_stock,prompt_tuning_4bit --output_dir {tmp_path}/out"
    command = [sys.executable, "benchmark.py", *words.split()]
    environment = os.environ | {"PYTHONUTF8": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["model"] == "qwen3-0.6b" and saved["matrix_product_rate"] > 1e8
    results = saved["results"]
    assert list(results) == ["full", "lora", "lora_stock", "prompt_tuning_4bit"]
    layer = 1024 * (16 + 8 + 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    total = 151936 * 1024 + layer + 1024
    assert results["full"]["trainable"] == total and results["full"]["trainable_percent"] == 100
    adapter = 8 * (3 * 1024 + (16 + 8 + 8) * 128)
    assert results["lora"]["trainable"] == adapter
    assert results["lora"]["trainable_percent"] == pytest.approx(100 * adapter / (total + adapter))
    assert results["prompt_tuning_4bit"]["trainable"] == 20 * 1024
    assert results["prompt_tuning_4bit"]["precision"] == "nf4"
    for name, figures in results.items():
        assert len(figures["losses"]) == 3 and 8 < figures["losses"][0] < 20
        assert 0.5 < figures["peak_gib"] < 10 and figures["seconds"] > 0 and figures["cpu_seconds"] > 0
        ratio = figures["supervised_tokens_per_second"] / figures["tokens_per_second"]
        assert ratio == pytest.approx(11 / 12)  # nothing predicts a row's first token
        if not name.startswith("full"):
            assert figures["peak_gib"] < results["full"]["peak_gib"]
    assert results["lora"]["losses"] == pytest.approx(results["lora_stock"]["losses"], abs=1e-4)
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 6 and "| 1.00 |" in table[2] and "| LoRA, stock Trainer, padded | float32 |" in table[4]
    assert (tmp_path / "out/benchmark.png").read_bytes().startswith(b"\x89PNG")


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
        assert stop.value.code == 1 and "can not be compared" in capsys.readouterr().err


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
