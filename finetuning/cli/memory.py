"""Memory: how much of a device is in use, and what to do if there is not enough."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from finetuning.cli.console import fail

GIB = 2**30
# What torch, the kernel, cuBLAS and cuDNN say when memory runs out. Not all of them raise torch.OutOfMemoryError.
OUT_OF_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)


def allow_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, so that rows of many lengths leave few gaps, unless the user set it up.

    PyTorch reads the variable when it first allocates. On Windows it has no such segments.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform != "win32" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def used_memory(device: torch.device) -> int:
    """The memory of the device that this process's tensors take now, in bytes; of a CPU, all that the process takes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """The most that `used_memory` has been, in bytes, since the start or `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # Metal counts no peak, but PyTorch gives nothing back to it
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_reserved(device: torch.device) -> int:
    """The most that this process has taken from the device: its tensors, and what PyTorch keeps for later ones."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far. Without a GPU only Linux can; elsewhere the peak stays that since the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # man proc: resets the peak resident set size


def total_memory(device: torch.device) -> int:
    """The memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total


def memory_of_others(device: torch.device) -> int:
    """What this process cannot have of the device: other programs and, on a GPU, the CUDA context. 0 if unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return 0
    memory = psutil.virtual_memory()
    return max(0, memory.total - memory.available - used_memory(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_advice(device: torch.device, remedies: Iterable[str], activity: str = "") -> Iterator[None]:
    """Inside the context, running out of memory ends the program with code 1: the measured need, and what to try.

    Args:
        remedies: flags of the script that runs, or commands, best first. The innermost of several contexts speaks.
        activity: if it is not clear to the user, for example "while loading the model".
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error))
        size, unit = asked.groups() if asked else ("", "")
        size, unit = (f"{int(size) / GIB:.2f}", "GiB") if unit == "bytes" else (size, unit)  # bytes: on a CPU
        more = f" and {size} {unit} more were needed" if asked else ""
        others = ""
        with suppress(RuntimeError):  # a GPU that is full may not even answer this
            others = f", of which other programs hold {memory_of_others(device) / GIB:.1f}"
        message = f"out of memory {activity}".rstrip() + f": {peak_reserved(device) / GIB:.2f} GiB were in use{more}"
        message += f", of {total_memory(device) / GIB:.1f} GiB{others}"
        fail("\nTry, in this order: ".join(filter(None, [message, "; ".join(remedies)])), 1)
