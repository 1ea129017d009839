"""dry_run.py and memory.py: a measured plan, and one message if memory runs out (trap 38)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, Run, make_model, make_tokenizer, save_checkpoint
from transformers import Trainer

import train_lora
import train_prompt_tuning


def read_plan(printed: str) -> dict[str, float]:
    return {name.strip(): float(size) for name, size in re.findall(r"^  (\S.*?) +([\d.]+)$", printed, flags=re.M)}


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_dry_run(run_main: Run, script: object, base_path: str, rows_path: str, tmp_path: Path) -> None:
    """The parts, the rows, the steps and the time; nothing is written, and a used folder is no obstacle."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine", encoding="utf-8")
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out --dry_run True"
    printed = run_main(script, *words.split(), "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    plan = read_plan(printed)
    parts = ["base weights", "adapter, gradients, optimizer", "activations", "logits", "Python and its libraries"]
    assert list(plan) == [*parts, "peak", "this machine has"]
    assert sum(plan[name] for name in parts) == pytest.approx(plan["peak"], abs=0.05)
    assert 0.1 < plan["peak"] < plan["this machine has"]
    assert "the run: 12 rows, 6 steps of 8 rows, about 0 s" in printed
    assert "'loss'" not in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_plan_names_the_logits(run_main: Run, tmp_path: Path) -> None:
    """500 learnt tokens of a vocabulary of 60,000: 0.11 GiB of logits at a time, and no more with 1,000."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(vocab_size=60_000))
    for tokens in (500, 1000):
        rows = tmp_path / "rows.json"
        rows.write_text('[{"instruction": "a", "output": "' + "b" * tokens + '"}]', encoding="utf-8")
        words = f"--model_path {path} --data_path {rows} --output_dir {tmp_path}/out --dry_run True"
        plan = read_plan(run_main(train_lora, *words.split(), "--max_length", 2000))
        assert 0.1 < plan["logits"] < 0.4


def test_out_of_memory_message(
    run_main: Run, base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 38: the need, and the flags that are not used yet, in order."""

    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "training_step", run_out)
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out".split()
    message = run_main(train_lora, *words, expected=1)
    assert "2.00 GiB more were needed" in message
    remedies = ["--gradient_checkpointing True", "--load_in_4bit True", "--per_device_train_batch_size 1 "]
    places = [message.index(words) for words in [*remedies, "--gradient_accumulation_steps 8", "--max_length 512"]]
    assert places == sorted(places)
    more = "--gradient_checkpointing True --per_device_train_batch_size 1 --max_length 400 --dry_run True"
    message = run_main(train_lora, *words, *more.split(), expected=1)
    assert "--gradient_checkpointing" not in message and "batch_size" not in message and "--max_length 200" in message


def test_other_runtime_errors_keep_their_traceback(
    run_main: Run, base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "training_step", break_down)
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out".split()
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(train_lora, *words)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_really_runs_out(tmp_path: Path) -> None:
    """In a process that may take only 150 MB more once training starts."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(intermediate_size=20_000))
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "' + "b" * 4000 + '"}]', encoding="utf-8")
    words = f"--model_path {path} --data_path {rows} --output_dir {tmp_path}/out --max_length 5000"
    script = (
        "import resource, psutil, train_lora, common\n"
        "original = common.make_trainer\n"
        "def limited(*args, **kwargs):\n"
        "    limit = psutil.Process().memory_info().vms + 150 * 2**20\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "    return original(*args, **kwargs)\n"
        "common.make_trainer = limited\n"
        "train_lora.main()\n"
    )
    command = [sys.executable, "-c", script, *words.split()]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and "out of memory: " in result.stderr
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
