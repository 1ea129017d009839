"""The rehearsal: what the longest rows need is known before the first step, and nothing of it stays."""

import json
import re
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from support import STEP, Run, equal_weights, logged
from transformers import Trainer

import train_lora
import train_prompt_tuning
from finetuning.training import dry_run
from finetuning.training.dry_run import Rehearsal


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are not tried before: what the tests put into the Trainer is meant for the run."""
    monkeypatch.setattr("finetuning.training.flags.try_out", Mock())


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU rehearse as a GPU does."""
    monkeypatch.setattr(dry_run, "is_worth_rehearsing", lambda device: True)


@pytest.fixture
def long_row(flags: list[str], tmp_path: Path) -> list[str]:
    """The flags of a run whose 7th row is by far the longest."""
    lengths = {number: 300 if number == 7 else 5 * number for number in range(1, 13)}
    rows = [{"instruction": f"Say {number}", "output": "a" * length} for number, length in lengths.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return [*flags, "--data_path", str(tmp_path / "rows.json"), "--sample_answers", "0"]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, most_rows: int, most_tokens: int) -> None:
    """Let each step on more rows or tokens fail."""
    original = Trainer.training_step

    def run_out(self: Trainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: object) -> torch.Tensor:
        if len(inputs["row_numbers"]) > most_rows or inputs["input_ids"].numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return original(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", run_out)


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing", "True", "--gradient_accumulation_steps", "2"]])
@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_of_it_stays(
    run_main: Run,
    flags: list[str],
    script: object,
    more: list[str],
    gpu: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same losses and the same adapter as without it, with dropout and clipped gradients."""
    more = [*more, "--logging_steps", 1, "--keep_checkpoints", True]
    monkeypatch.setattr(dry_run, "is_worth_rehearsing", lambda device: gpu)
    run_main(script, *flags, *more)
    monkeypatch.setattr(Rehearsal, "on_train_begin", lambda *args, **kwargs: None)
    run_main(script, *flags, *more, "--output_dir", tmp_path / "without")
    assert logged(tmp_path / "out") == logged(tmp_path / "without")
    assert equal_weights(tmp_path / "out", tmp_path / "without")


def record_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The rows, tokens and highest row number of each pass."""
    passes, original = [], Trainer.training_step

    def record(self: Trainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: object) -> torch.Tensor:
        passes.append((len(inputs["row_numbers"]), inputs["input_ids"].numel(), max(inputs["row_numbers"])))
        return original(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", record)
    return passes


MEMORY = r"^memory +([\d.]+) GiB of ([\d.]+), (measured on|computed for) the longest rows \(up to (\d+) tokens\)"


def test_memory_and_time_are_known_before_the_first_step(
    run_main: Run, long_row: list[str], monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    """One pass, with the longest row among four, whose time counts for each batch of each step."""
    passes = record_passes(monkeypatch)
    clock = chain([0, 5], count(300))  # begin and end of the pass; then the run's own time
    monkeypatch.setattr("finetuning.training.dry_run.time.perf_counter", lambda: next(clock))
    words = ["--max_steps", 3, "--gradient_accumulation_steps", 2, "--logging_strategy", "no"]
    printed = run_main(train_lora, *long_row, *words)
    rows, tokens, row = passes[0]
    assert len(passes) == 1 + 3 * 2 - 1 and rows == 4 and row >= 7 and tokens > 300 + 3 * 50  # 12 rows: 3 batches
    mean = int(re.search(r"^tokens +([\d,]+)", printed, re.M)[1].replace(",", "")) / 12
    assert f"\ntime        at most {3 * 2 * 5 * mean / (tokens / 4):.0f} s" in printed
    peak, free, how, longest = re.search(MEMORY, printed, re.M).groups()
    at_the_end = float(re.search(r"peak memory ([\d.]+) GiB", printed)[1])
    assert how == "measured on" and 0.1 < float(peak) <= at_the_end + 0.01 < float(free) and 300 < int(longest) < 350


def test_on_a_cpu_it_is_computed(run_main: Run, long_row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass costs as much as a step there: none is taken, and the line says what was computed for the longest rows."""
    passes = record_passes(monkeypatch)
    printed = run_main(train_lora, *long_row, "--max_steps", 3)
    assert len(passes) == 3 and "\ntime  " not in printed
    peak, free, how, longest = re.search(MEMORY, printed, re.M).groups()
    assert how == "computed for" and 0.1 < float(peak) < float(free) and 300 < int(longest) < 350


def test_rows_that_do_not_fit_are_named_before_the_first_step(
    run_main: Run, long_row: list[str], monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    run_out_of_memory(monkeypatch, most_rows=4, most_tokens=300)
    message = run_main(train_lora, *long_row, "--logging_steps", 1, expected=1)
    assert re.match(r"error: out of memory on the longest rows \(7, 12, 11, 10: up to 3\d\d tokens\): ", message)
    assert "2.00 GiB more were needed" in message and "--max_length 1" in message
    assert not STEP.search(message)


def test_a_smaller_batch_is_found_with_the_longest_rows(
    run_main: Run, long_row: list[str], monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    """The Trainer's own `--auto_find_batch_size`: it is not kept from trying."""
    run_out_of_memory(monkeypatch, most_rows=2, most_tokens=1000)
    printed = run_main(train_lora, *long_row, "--auto_find_batch_size", True, "--logging_steps", 1)
    assert "saved in" in printed and len(STEP.findall(printed)) == 6


def test_the_loss_of_a_row_is_not_blamed_on_the_first_step(
    run_main: Run, long_row: list[str], monkeypatch: pytest.MonkeyPatch, on_gpu: None
) -> None:
    """A row without a finite loss is named with the step that it came in."""
    original = train_lora.train

    def spoil(model: torch.nn.Module, *args: object) -> None:
        def spoil_long(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output * (torch.nan if output.shape[1] > 300 else 1)

        model.get_base_model().model.norm.register_forward_hook(spoil_long)
        original(model, *args)

    monkeypatch.setattr(train_lora, "train", spoil)
    words = "--per_device_train_batch_size 1 --max_steps 12 --logging_steps 12 --logging_first_step False --seed 1"
    message = run_main(train_lora, *long_row, *words.split(), expected=1)
    step, row = re.search(r"step (\d+) \(rows? (\d+) of", message).groups()
    assert row == "7" and int(step) > 1


@pytest.mark.parametrize(("finds_batch", "rows"), [(False, 4), (True, 2)])
def test_the_batch_is_that_of_this_run(
    monkeypatch: pytest.MonkeyPatch, on_gpu: None, finds_batch: bool, rows: int
) -> None:
    """Of two processes with two rows each, resumed by one with four: the checkpoint's state still says two.

    With several processes, and optimizers that change the weights in the backward pass, no pass is taken.
    """
    measured: list[int] = []
    monkeypatch.setattr(dry_run, "take_pass", lambda trainer, batch: measured.append(len(batch)) or 1.0)
    args = SimpleNamespace(world_size=1, optim="adamw_torch", device=torch.device("cpu"), train_batch_size=4)
    args.auto_find_batch_size, args.gradient_accumulation_steps = finds_batch, 1
    state = SimpleNamespace(train_batch_size=2, max_steps=2, global_step=0)
    dataset = Dataset.from_dict({"length": [3] * 8, "row_number": list(range(8))})
    trainer = SimpleNamespace(train_dataset=dataset, not_finite_guard=SimpleNamespace(forwards=[]))
    trainer.model = torch.nn.Linear(2, 2)
    Rehearsal(trainer, []).on_train_begin(args, state)
    assert measured == [rows]
    for processes, optimizer in ((2, "adamw_torch"), (1, "galore_adamw_layerwise"), (1, "adalomo")):
        args.world_size, args.optim = processes, optimizer
        Rehearsal(trainer, []).on_train_begin(args, state)
    assert measured == [rows]
