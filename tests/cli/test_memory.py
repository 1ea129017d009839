"""memory.py: one message whenever memory runs out (traps 38, 65), and memory of the device that works (trap 83)."""

from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch

from finetuning.cli import memory
from finetuning.cli.memory import is_out_of_memory, memory_advice

CPU, GPU, MAC = torch.device("cpu"), torch.device("cuda:1"), torch.device("mps")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes. Error code 12 ..."
    ),
    RuntimeError("unable to mmap 4096 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB, max allowed: ...)"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


def raising(error: Exception) -> Callable[..., None]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}: {error}"[:40])
def test_every_kind_gives_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(SystemExit) as stop, memory_advice(CPU, ["--a 1", "--b 2"], "while knitting"):
        raise error
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.startswith("error: out of memory while knitting: ")
    assert ("2.00 GiB more were needed" in message) == ("ried to allocate" in str(error))
    assert message.endswith("\nTry, in this order: --a 1; --b 2\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(28, "No space left on device"), KeyError("memory")])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error.args[-1])), memory_advice(CPU, []):
        raise error


def test_a_full_gpu_that_answers_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", raising(torch.AcceleratorError("CUDA error: out of memory")))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * 2**30))
    with pytest.raises(SystemExit), memory_advice(GPU, []):
        raise ERRORS[1]
    assert capsys.readouterr().err == "error: out of memory: 1.00 GiB were in use, of 16.0 GiB\n"


def test_memory_of_the_device_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """--use_cpu True on a machine with a GPU measures main memory; the second GPU is not the first."""
    cuda = {"memory_allocated": 1, "max_memory_allocated": 2, "memory_reserved": 3, "max_memory_reserved": 4}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device == GPU else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100) if device == GPU else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 6)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 7)
    functions = (memory.used_memory, memory.peak_memory, memory.peak_reserved, memory.total_memory)
    assert [function(GPU) for function in functions] == [1, 2, 4, 100]
    assert [function(MAC) for function in functions] == [5, 6, 6, 7]
    assert memory.memory_of_others(GPU) == 100 - 10 - 3
    used, peak, reserved, total = (function(CPU) for function in functions)
    assert 10**8 < used < 1.1 * peak and 0.9 * peak < reserved < total == psutil.virtual_memory().total
    assert 0 <= memory.memory_of_others(CPU) < total - used
