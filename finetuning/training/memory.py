"""Memory: how much is in use, and what to do if there is not enough."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import TrainingArguments

from finetuning.cli.console import fail

GIB = 2**30


def used_memory() -> int:
    """The memory that this process holds now, in bytes: GPU memory if there is a GPU, else main memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most memory that this process has held, in bytes, since its start or `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Forget the peak so far. Without a GPU only Linux can; elsewhere the peak stays that since the start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # man proc: resets the peak resident set size


def total_memory() -> int:
    """The memory of the device, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


@contextmanager
def memory_advice(training_args: TrainingArguments, load_in_4bit: bool, max_length: int) -> Iterator[None]:
    """Inside the context, running out of memory ends with one message: the measured need, and flags to try in order."""
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
