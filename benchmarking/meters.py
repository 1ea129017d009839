"""What is measured: time after the warm-up, tokens, the size of the matrix products, the speed of the machine."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from finetuning.preprocessing.encode import IGNORE_INDEX


class Stopwatch(TrainerCallback):
    """Times the steps after the warm-up, in `seconds` of the clock and `cpu_seconds` of the processor."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.start = (0.0, 0.0)

    def read(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup_steps:
            self.start = self.read()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self.cpu_seconds = (now - then for now, then in zip(self.read(), self.start, strict=True))


class TokenCounter:
    """A collator that records for each batch the number of tokens, and of supervised tokens, before it collates."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[tuple[int, int]] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        supervised = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
        self.batches.append((sum(len(row["input_ids"]) for row in rows), supervised))
        return self.collator(rows)


def count_products(model: PreTrainedModel) -> dict[str, int]:
    """The weights that each token is multiplied with, in the layers and in lm_head, and the number of parameters."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    sizes = {name: module.in_features * module.out_features for name, module in linear.items()}
    return {
        "layers": sum(size for name, size in sizes.items() if name != "lm_head"),
        "head": sizes["lm_head"],
        "parameters": model.num_parameters(),
    }


def measure_machine() -> dict[str, Any]:
    """The device, torch's version, and the operations per second of a large matrix product in training's precision."""
    on_cuda = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_cuda else (2048, torch.float32, "cpu")
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if on_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    name = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "matrix_product_rate": 2 * size**3 / best}
