"""Two processes train the same adapter as one: the model's own forward runs under DDP."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import REPOSITORY


@pytest.mark.parametrize("script", ["train_lora", "train_prompt_tuning"])
def test_two_processes_equal_one(
    script: str, base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--model_path {base_path} --data_path {rows_path} --max_steps 4 --use_cpu True --disable_tqdm True"
    flags += " --train_sampling_strategy sequential" + (" --lora_dropout 0" if script == "train_lora" else "")
    one = [*flags.split(), "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]
    monkeypatch.setattr("sys.argv", [f"{script}.py", *one])
    importlib.import_module(script).main()

    two = [*flags.split(), "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(REPOSITORY / f"{script}.py"), *two]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trainable parameters") == 1
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for tensor, other in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-6)
