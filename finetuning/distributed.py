"""Several processes, each with a GPU of its own: what engine joins them, how they share rows, and sharded weights."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, concatenate_datasets
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from finetuning.cli.console import fact, fail, is_main_process
from finetuning.preprocessing.encode import IGNORE_INDEX

# What a process gets that has no row left: nothing is supervised.
BLANK_ROW = {"input_ids": [0], "attention_mask": [1], "labels": [IGNORE_INDEX]}


def engine_asked_for(args: Any) -> str | None:
    """ "FSDP" or "DeepSpeed" if a flag of TrainingArguments or accelerate's configuration asks for it; else None."""
    for name, flag in {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed}.items():
        if flag or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            return name
    return None


def check_engine(engine: str | None, use_cpu: bool) -> None:
    """Refuse an engine (from `engine_asked_for`) that cannot work here: accelerate would train on without it."""
    if engine and use_cpu:
        fail(f"{engine} was asked for, but there is no GPU, and accelerate would leave it out; use configs/ddp.yaml")
    if engine and "LOCAL_RANK" not in os.environ:
        fail(f"{engine} was asked for, but this process was started alone; start it with accelerate launch or torchrun")
    if engine == "DeepSpeed" and not find_spec("deepspeed"):
        fail("DeepSpeed was asked for, but is not installed: pip install deepspeed")


def shards_weights(args: TrainingArguments) -> bool:
    """Whether each process holds only a part of the base weights: with FSDP, and with DeepSpeed's ZeRO-3."""
    if engine_asked_for(args) == "DeepSpeed":
        return is_deepspeed_zero3_enabled()
    return engine_asked_for(args) == "FSDP"


def adjust_fsdp(plugin: FullyShardedDataParallelPlugin, layers: Iterable[torch.nn.Module]) -> None:
    """Let FSDP shard by decoder layers, cast nothing, and save in parts, whatever the configuration says.

    accelerate looks for layers by names of the model's class; Qwen3.5 has some there that its text part lacks.
    Autocast casts, as everywhere; accelerate's policy would also add up gradients, and hand out the loss, in half
    precision. FULL_STATE_DICT would gather all base weights in one process for each checkpoint.
    """
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")


class EqualTurns(BatchSampler):
    """The batches of an epoch, and then empty ones until each process has had as many.

    accelerate alone repeats rows from the beginning of the epoch, which would then count twice.
    """

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        self.batches = batches
        self.processes = processes
        self.drop_last = False
        self.batch_size = None  # tells accelerate that batches differ in size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches
        yield from [[] for _ in range(len(self) - len(self.batches))]


def share_rows_once(loader: DataLoader) -> DataLoader:
    """Let each row of an epoch reach one process, once. Changes accelerate's loader, if it deals batches out."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and shard.num_processes > 1 and not shard.drop_last:
        shard.batch_sampler = EqualTurns(shard.batch_sampler, shard.num_processes)
        shard.batch_size = None
    return loader


def fill_up(dataset: Dataset, multiple: int) -> Dataset:
    """The dataset, and rows without supervised tokens up to a multiple: for evaluation, which has no order to keep."""
    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    blank = {name: BLANK_ROW.get(name, 0) for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_list([blank] * missing, features=dataset.features)])


def count_processes() -> int:
    """How many processes the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say_how_many(args: TrainingArguments) -> None:
    """Print how many processes share the rows of a step; only the first of them shows progress bars."""
    processes = count_processes()
    if not is_main_process():
        logging.disable_progress_bar()
    if processes > 1:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        engine = engine_asked_for(args) or "DDP"
        fact("processes", f"{processes} ({engine}), {rows} rows each: {rows * processes} rows a step")


# ---- sharded weights, with FSDP or DeepSpeed's ZeRO-3: reading them takes all processes


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside the context, parameters that ZeRO-3 has sharded are gathered; without ZeRO-3 nothing happens."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # not a requirement

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a full parameter; a copy of them, if ZeRO-3 has sharded it."""
    if not is_deepspeed_zero3_enabled():
        return parameter.detach()
    with gathered([parameter]):
        return parameter.detach().clone()


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of the full parameter; what ZeRO-3 leaves instead has the shape (0,)."""
    return parameter.ds_shape if is_deepspeed_zero3_enabled() else parameter.shape


def whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, gathered from the shards that FSDP has made of the tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
