"""What each of several processes does in tests/training/test_distributed.py and test_sharding.py; torchrun starts it.

    PYTHONPATH=.:tests torchrun --nproc_per_node 2 tests/ranks.py '[["train_lora", "--max_steps", "2"]]'

It runs the command lines one after the other, which saves the start of new processes. With "fsdp" before the script's
name the run goes through accelerate's FSDP2 on CPUs, which accelerate itself refuses: the CPUs pass for GPUs. With
"fully_shard", torch's own FSDP2 is put around the models of support.py, and the difference from one process is printed;
with "deepspeed" (pip install deepspeed; DS_ACCELERATOR=cpu) it is DeepSpeed's ZeRO-2 and ZeRO-3.
"""

import importlib
import json
import os
import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from support import make_model, make_rows, make_soft
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.training import flags
from finetuning.training.attention import attention
from finetuning.training.collators import FlattenCollator
from finetuning.training.losses import put_loss_head

# What `accelerate launch --config_file configs/fsdp.yaml` sets; tests/training/test_sharding.py compares.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def train(script: str, *words: str) -> None:
    sys.argv = [f"{script}.py", *words]
    importlib.import_module(script).main()


def train_with_fsdp(script: str, *words: str) -> None:
    check = flags.check_combinations

    def pass_for_gpus(data: object, args: object) -> None:
        check(data, args)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with (
        patch.dict(os.environ, FSDP),
        patch.object(flags, "check_engine", lambda *args: None),
        patch.object(flags, "check_combinations", pass_for_gpus),
    ):
        train(script, *words)


def loss_and_gradients(
    model: PeftModel, rows: list[dict[str, list[int]]], divisor: int, engine: Any = None
) -> tuple[float, list[torch.Tensor | None]]:
    """Of a batch of the rows; with DeepSpeed, its engine around the model keeps the gradients."""
    base = model.get_base_model()
    batch = FlattenCollator(len(getattr(model, "virtual_tokens", [])))(rows)
    half = base.dtype == torch.bfloat16
    with attention(base, "rows"), torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = base.get_output_embeddings().loss(engine or model, batch, torch.tensor(divisor))
    engine.backward(2 * loss) if engine else loss.backward()  # DeepSpeed divides by the number of processes
    return loss.item(), [parameter.grad for parameter in trained(model)]


def make_adapted(kind: str, dtype: torch.dtype) -> PeftModel:
    if kind == "soft prompt":
        model = make_soft()
        put_loss_head(model.get_base_model().to(dtype))
        return model
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(make_model().to(dtype), config)
    put_loss_head(model.get_base_model())
    generator = torch.Generator().manual_seed(5)
    for parameter in trained(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shard_directly() -> None:
    """Print how far loss and gradients with torch's `fully_shard` are from those of one process."""
    rank, rows = dist.get_rank(), make_rows((9, 3, 14, 6))
    divisor = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    for kind in ("lora", "soft prompt"):
        for dtype in (torch.float32, torch.bfloat16):
            alone, sharded = make_adapted(kind, dtype), make_adapted(kind, dtype)
            loss, gradients = loss_and_gradients(alone, rows, divisor)
            for layer in sharded.get_base_model().model.layers:
                fully_shard(layer, mp_policy=MixedPrecisionPolicy())
            fully_shard(sharded, mp_policy=MixedPrecisionPolicy())
            part, parts = loss_and_gradients(sharded, rows[rank::2], divisor)
            total = torch.tensor(part)
            dist.all_reduce(total)
            parts = [2 * part.full_tensor() for part in parts]  # FSDP divides by the number of processes
            scale = max(gradient.abs().max().item() for gradient in gradients)
            difference = max((a - b).abs().max().item() for a, b in zip(gradients, parts, strict=True)) / scale
            report = {"kind": kind, "dtype": str(dtype), "loss": abs(total.item() - loss), "gradient": difference}
            if rank == 0:
                print("fully_shard", json.dumps(report), flush=True)


def divide_with_deepspeed() -> None:
    """Print how far losses and weights after three steps with DeepSpeed's ZeRO are from those of one process."""
    import deepspeed  # not among the packages of the tests

    rank, rows = dist.get_rank(), make_rows((9, 3, 14, 6))
    divisor = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    for stage in (2, 3):
        for kind in ("lora", "soft prompt"):
            alone, divided = make_adapted(kind, torch.float32), make_adapted(kind, torch.float32)
            alone_optimizer, optimizer = (torch.optim.AdamW(trained(model), lr=0.01) for model in (alone, divided))
            config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
            config |= {"zero_allow_untested_optimizer": True, "gradient_accumulation_steps": 1}
            engine, *_ = deepspeed.initialize(model=divided, optimizer=optimizer, config=config)
            losses = []
            for _ in range(3):
                loss, _ = loss_and_gradients(alone, rows, divisor)
                alone_optimizer.step()
                alone_optimizer.zero_grad()
                total = torch.tensor(loss_and_gradients(divided, rows[rank::2], divisor, engine)[0])
                engine.step()
                dist.all_reduce(total)
                losses.append(abs(total.item() - loss))
            with deepspeed.zero.GatheredParameters(trained(divided), enabled=stage == 3):
                pairs = zip(trained(alone), trained(divided), strict=True)
                difference = max((one - other).abs().max().item() for one, other in pairs)
            if rank == 0:
                print(f"ZeRO-{stage}", json.dumps({"kind": kind, "losses": losses, "weights": difference}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for words in json.loads(sys.argv[1]):
        if words[0] == "fully_shard":
            shard_directly()
        elif words[0] == "deepspeed":
            divide_with_deepspeed()
        elif words[0] == "fsdp":
            train_with_fsdp(*words[1:])
        else:
            train(*words)


if __name__ == "__main__":
    main()
