"""Memory: how much a run needs, measured before it starts, and what to do where there is not enough."""

import copy
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from collators import IGNORE_INDEX
from console import fail, say
from trainer import fast_steps, make_trainer

GIB = 2**30


def used_memory() -> int:
    """The memory that this process holds now, in bytes: of the GPU where there is one, else of the machine."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most memory this process has held, in bytes, since its start or `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Begin to count anew. On a CPU only Linux can; elsewhere the peak since the start is as near as one gets."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # man proc: resets the peak resident set size


def total_memory() -> int:
    """The memory of the device, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


class StepMeter(TrainerCallback):
    """Notes for each step the memory before it, its peak, and its seconds."""

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
    """Take steps on the longest rows, and print what memory they took, part by part, and how long the run would be.

    The parts are differences: a step that learns one token of each row needs all but the logits of the others.
    """
    batch_size = training_args.per_device_train_batch_size
    lengths = [len(ids) for ids in train_dataset["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-batch_size:]
    rows = [train_dataset[number] for number in longest]
    one_token = [row | {"labels": [IGNORE_INDEX] * (len(row["labels"]) - 1) + row["input_ids"][-1:]} for row in rows]
    args = copy.copy(training_args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = len(rows), 1
    args.max_steps, args.train_sampling_strategy = 4, "sequential"
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.load_best_model_at_end = [], False
    args.disable_tqdm, args.logging_first_step = True, False
    meter = StepMeter()
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        dataset = Dataset.from_list([*one_token, *one_token, *rows, *rows])
        trainer = make_trainer(model, pad_token_id, args, dataset, callbacks=(meter,))
        trainer.remove_callback(PrinterCallback)
        with fast_steps(trainer):
            trainer.train()

    weights = sum(nbytes(p) for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    adapter = sum(nbytes(p) for p in model.parameters() if p.requires_grad)
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    optimizer = adapter + sum(nbytes(tensor) for tensor in states)  # gradients are as large as what is trained
    peak = max(meter.peaks)
    logits = peak - meter.peaks[1]
    activations = meter.peaks[1] - meter.before[0] - optimizer
    tokens = sum(lengths[number] for number in longest)
    learnt = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    say(f"memory, measured on the {len(rows)} longest rows ({tokens:,} tokens, {learnt:,} of them learnt), in GiB:")
    for name, size in (
        ("base weights", weights),
        ("adapter, gradients, optimizer", adapter + optimizer),
        ("activations", activations),
        ("logits", logits),
        ("other" if torch.cuda.is_available() else "Python and its libraries", meter.before[0] - weights - adapter),
        ("peak", peak),
        ("this machine has", total_memory()),
    ):
        say(f"  {name:30} {max(0, size) / GIB:8.2f}")

    rows_per_step = batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(len(lengths) / rows_per_step) * training_args.num_train_epochs)
    tokens_per_step = min(rows_per_step, len(lengths)) / training_args.world_size * sum(lengths) / len(lengths)
    seconds = steps * tokens_per_step * min(meter.seconds[2:]) / tokens
    say(f"the run: {len(lengths):,} rows, {steps:,} steps of {rows_per_step} rows, about {describe_time(seconds)}")


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def describe_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def memory_advice(training_args: TrainingArguments, load_in_4bit: bool, max_length: int) -> Iterator[None]:
    """Within, running out of memory ends with one message: the measured need, and the flags to try, in order."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        asked = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error))
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
        flags = []
        if not training_args.gradient_checkpointing:
            flags.append("--gradient_checkpointing True")
        if not load_in_4bit:
            flags.append("--load_in_4bit True")
        if batch > 1:
            flags.append(f"--per_device_train_batch_size 1 --gradient_accumulation_steps {batch * accumulation}")
        flags.append(f"--max_length {max_length // 2}")
        more = f" and {' '.join(asked.groups())} more were needed" if asked else ""
        need = f"{peak_memory() / GIB:.2f} GiB were in use{more}, of {total_memory() / GIB:.1f} GiB"
        fail(f"out of memory: {need}.\nTry, in this order: {'; '.join(flags)}", 1)
