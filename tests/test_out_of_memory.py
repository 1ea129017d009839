"""Trap 65: memory may run out anywhere in a command; one message fits the place, and names only flags of the script."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import bitsandbytes
import pytest
from support import REPOSITORY, Run, make_model, make_tokenizer, save_checkpoint
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM, Trainer, TrainingArguments

import benchmark
import inference
import train_lora
import train_prompt_tuning
from benchmarking.flags import BenchmarkArguments
from finetuning.cli.arguments import ModelArguments
from finetuning.preprocessing.flags import DataArguments
from finetuning.training.flags import RunArguments
from inference import InferenceArguments

SCRIPTS = {
    train_lora: (ModelArguments, DataArguments, RunArguments, train_lora.LoraArguments, TrainingArguments),
    train_prompt_tuning: (
        ModelArguments,
        DataArguments,
        RunArguments,
        train_prompt_tuning.PromptTuningArguments,
        TrainingArguments,
    ),
    inference: (ModelArguments, InferenceArguments),
    benchmark: (ModelArguments, BenchmarkArguments),
}
NO_MEMORY = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def run_out(*args: object, **kwargs: object) -> None:
    raise NO_MEMORY


def advice(message: str, script: ModuleType) -> list[str]:
    """The remedies of a message, all of whose flags the script has."""
    known = {field.name for arguments in SCRIPTS[script] for field in fields(arguments)}
    _, _, remedies = message.partition("\nTry, in this order: ")
    assert set(re.findall(r"--(\w+)", remedies)) <= known
    return remedies.split("; ")


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are not tried before: what the tests put into the Trainer is meant for the run."""
    monkeypatch.setattr("finetuning.training.flags.try_out", Mock())


@pytest.fixture
def adapter_path(trained: Callable[..., Path]) -> Path:
    return trained(train_lora)


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning, inference])
def test_while_loading_the_model(
    run_main: Run, script: ModuleType, base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)
    words = ["--model_path", base_path] + ([] if script is inference else ["--output_dir", tmp_path])
    message = run_main(script, *words, expected=1)
    assert message.startswith("error: out of memory while loading the model: ")
    assert advice(message, script) == ["--load_in_4bit True"]
    assert "Try" not in run_main(script, *words, "--load_in_4bit", True, expected=1)


def test_while_quantising_the_model(run_main: Run, base_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers catches the error, and names it only in a long report, which nobody should have to read."""
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", run_out)
    message = run_main(inference, "--model_path", base_path, "--load_in_4bit", True, expected=1)
    assert message.startswith("error: out of memory while loading the model: ")


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_while_making_the_adapter(
    run_main: Run, script: ModuleType, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = "add_lora" if script is train_lora else "add_soft_prompt"
    monkeypatch.setattr(script, maker, run_out)
    message = run_main(script, *flags, expected=1)
    assert advice(message, script)[:2] == ["--gradient_checkpointing True", "--load_in_4bit True"]


def test_while_evaluating_in_training(
    run_main: Run, flags: list[str], rows_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one row a step, the rows of the evaluation are the largest batch."""
    monkeypatch.setattr(Trainer, "evaluate", run_out)
    flags += (
        f"--per_device_train_batch_size 1 --eval_data_path {rows_path} --eval_strategy steps --eval_steps 2".split()
    )
    message = run_main(train_lora, *flags, expected=1)
    assert "--per_device_eval_batch_size 1" in advice(message, train_lora)


def test_in_the_metrics_at_the_end(
    run_main: Run, flags: list[str], rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is saved already: what is left to do is one command of inference.py."""
    monkeypatch.setattr("finetuning.generation.evaluate.answer_rows", run_out)
    message = run_main(train_lora, *flags, "--eval_data_path", rows_path, expected=1)
    assert "after the adapter was saved" in message and (tmp_path / "out/adapter_model.safetensors").exists()
    (command,) = advice(message, inference)
    assert command == f"python inference.py --adapter_path {tmp_path}/out --data_path {rows_path} --batch_size 1"
    monkeypatch.undo()
    assert "| rows |   12 |" in run_main(inference, *command.split()[2:], "--max_new_tokens", 8)


BATCHES, IN_4BIT, SHORTER = "--batch_size 4", "--load_in_4bit True", "--max_new_tokens 128"
ANSWERING = {
    "samples": ([], [BATCHES, IN_4BIT, SHORTER]),
    "file": (["--data_path", "ROWS"], [BATCHES, IN_4BIT, SHORTER]),
    "file, small": (["--data_path", "ROWS", "--batch_size", "1", "--load_in_4bit", "True"], [SHORTER]),
    "labels": (["--data_path", "ROWS", "--labels", "a,b"], [BATCHES, IN_4BIT]),
    "instruction": (["--instruction", "Say sun"], [IN_4BIT, SHORTER]),
    "label": (["--instruction", "Say sun", "--labels", "a,b"], [IN_4BIT]),
    "chat": (["--interactive", "True"], [IN_4BIT, SHORTER]),
}


@pytest.mark.parametrize(("words", "remedies"), ANSWERING.values(), ids=ANSWERING)
def test_while_answering(
    run_main: Run,
    words: list[str],
    remedies: list[str],
    adapter_path: Path,
    rows_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", run_out)
    monkeypatch.setattr("builtins.input", lambda prompt: "Say sun")
    words = [rows_path if word == "ROWS" else word for word in words]
    message = run_main(inference, "--adapter_path", adapter_path, *words, expected=1)
    assert message.startswith("error: out of memory: ") and advice(message, inference) == remedies


def test_while_loading_the_adapter(run_main: Run, adapter_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.model.folder.PeftModelForCausalLM.load_adapter", run_out)
    message = run_main(inference, "--adapter_path", adapter_path, expected=1)
    assert message.startswith("error: out of memory while loading the adapter: ")
    assert advice(message, inference) == [IN_4BIT]


def test_in_a_benchmark(run_main: Run, base_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process that measures; test_benchmark.py has the one that starts it."""
    monkeypatch.setattr(Trainer, "training_step", run_out)
    words = f"--only lora --model_path {base_path} --sequence_length 100"
    message = run_main(benchmark, *words.split(), expected=1)
    assert advice(message, benchmark) == ["--gradient_checkpointing True", "--batch_size 1", "--sequence_length 50"]
    message = run_main(benchmark, *f"{words} --gradient_checkpointing True --batch_size 1".split(), expected=1)
    assert advice(message, benchmark) == ["--sequence_length 50"]


# A script that may take only so many MB more once it calls a function of common.py.
LIMITED = """
import resource, psutil, {script}, common
original = common.{function}
def limited(*args, **kwargs):
    limit = psutil.Process().memory_info().vms + {megabytes} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return original(*args, **kwargs)
common.{function} = limited
{script}.main()
"""


def run_script(script: str, *words: str) -> str:
    """Run a script in a process of its own, which must fail without a traceback; returns its error."""
    command = [sys.executable, "-c", script, *words]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr[result.stderr.index("error: ") :]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_really_runs_out_while_loading(tmp_path: Path) -> None:
    """The weights cannot even be mapped."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(intermediate_size=200_000))
    script = LIMITED.format(script="inference", function="AutoModelForCausalLM.from_pretrained", megabytes=20)
    message = run_script(script, "--model_path", path, "--instruction", "a")
    assert message.startswith("error: out of memory while loading the model: ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_really_runs_out_in_training(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(intermediate_size=20_000))
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "' + "b" * 4000 + '"}]', encoding="utf-8")
    words = f"--model_path {path} --data_path {rows} --output_dir {tmp_path}/out --max_length 5000"
    script = LIMITED.format(script="train_lora", function="make_trainer", megabytes=150)
    message = run_script(script, *words.split())
    assert "error: out of memory: " in message and "; --lora_dropout 0; --max_length 20" in message
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
