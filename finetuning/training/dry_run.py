"""The dry run: how much memory a run needs, measured part by part before it starts, and how long it would take."""

import copy
import math
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from finetuning.cli.console import say
from finetuning.preprocessing.prompts import IGNORE_INDEX
from finetuning.training.memory import GIB, peak_memory, reset_peak_memory, total_memory, used_memory
from finetuning.training.trainer import make_trainer


class StepMeter(TrainerCallback):
    """Records each step's starting memory, peak memory and duration."""

    def __init__(self) -> None:
        self.before: list[int] = []
        self.peaks: list[int] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        reset_peak_memory()
        self.before.append(used_memory())
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.peaks.append(peak_memory())


def print_plan(model: PeftModel, pad_token_id: int, train_dataset: Dataset, training_args: TrainingArguments) -> None:
    """Take a few steps on the longest rows, and print the memory of each part and how long the run would take.

    The parts are differences: a step that learns only one token of each row needs everything but the other logits.
    """
    lengths = [len(ids) for ids in train_dataset["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-training_args.per_device_train_batch_size :]
    rows = [train_dataset[number] for number in longest]
    one_token = [row | {"labels": [IGNORE_INDEX] * (len(row["labels"]) - 1) + row["input_ids"][-1:]} for row in rows]
    meter = StepMeter()
    optimizer = take_steps(model, pad_token_id, [one_token, one_token, rows, rows], training_args, meter)

    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    training = adapter + sum(tensor.nbytes for tensor in states)  # gradients are as large as what is trained
    peak = max(meter.peaks)
    parts = {
        "base weights": weights,
        "adapter, gradients, optimizer": adapter + training,
        "activations": meter.peaks[1] - meter.before[0] - training,
        "logits": peak - meter.peaks[1],
        "other" if torch.cuda.is_available() else "Python and its libraries": meter.before[0] - weights - adapter,
        "peak": peak,
        "this machine has": total_memory(),
    }
    tokens = sum(lengths[number] for number in longest)
    learnt = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    say(f"memory, measured on the {len(rows)} longest rows ({tokens:,} tokens, {learnt:,} of them learnt), in GiB:")
    for name, size in parts.items():
        say(f"  {name:30} {max(0, size) / GIB:8.2f}")
    print_duration(lengths, training_args, seconds_per_token=min(meter.seconds[2:]) / tokens)


def take_steps(
    model: PeftModel,
    pad_token_id: int,
    batches: list[list[dict[str, Any]]],
    training_args: TrainingArguments,
    meter: StepMeter,
) -> torch.optim.Optimizer:
    """Train on the batches, with nothing logged, saved or evaluated; returns the optimizer, whose states count too."""
    args = copy.copy(training_args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = len(batches[0]), 1
    args.max_steps, args.train_sampling_strategy = len(batches), "sequential"
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.load_best_model_at_end = [], False
    args.disable_tqdm, args.logging_first_step = True, False
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        dataset = Dataset.from_list([row for batch in batches for row in batch])
        trainer = make_trainer(model, pad_token_id, args, dataset, callbacks=(meter,))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.optimizer


def print_duration(lengths: list[int], args: TrainingArguments, seconds_per_token: float) -> None:
    """Print the steps of the run and an estimate of its time.

    Args:
        lengths: of the training rows, in tokens.
    """
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_per_epoch = math.ceil(len(lengths) / rows_per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    tokens_per_step = min(rows_per_step, len(lengths)) / args.world_size * sum(lengths) / len(lengths)
    duration = describe_duration(steps * tokens_per_step * seconds_per_token)
    say(f"the run: {len(lengths):,} rows, {steps:,} steps of {rows_per_step} rows, about {duration}")


def describe_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
