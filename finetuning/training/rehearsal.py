"""A rehearsal before the first step: the longest rows go through the model, which need the most memory.

A run that does not fit ends in its first seconds then, and not hours later when it meets them; and its time is known
before it starts. Nothing of it stays: no gradient, no loss, no random number that was drawn.
"""

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer

from finetuning.cli.memory import memory_advice, peak_reserved
from finetuning.training.collators import row_lengths
from finetuning.training.flags import Arguments, memory_flags

MOST_ROWS = 4  # named in a message
OPTIMIZER = 8  # bytes of a trained weight: the two numbers of AdamW
IN_BACKWARD = ("layerwise", "lomo")  # endings of optimizers that change the weights in the backward pass


class Rehearsal(NamedTuple):
    longest: int  # row, in tokens
    peak: int  # bytes: the most memory that the run will need
    seconds: float  # of a step


def take_pass(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    """The forward and the backward pass of a batch, which leave their gradients; returns the seconds they took.

    Args:
        trainer: in its training.
    """
    (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
    begin = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, batch, count)
    if trainer.args.device.type != "cpu":
        torch.accelerator.synchronize(trainer.args.device)
    return time.perf_counter() - begin


def rehearse(trainer: Trainer, args: Arguments) -> Rehearsal | None:
    """Take the forward and the backward pass of a batch of the longest rows and of one of usual rows, and measure them.

    Returns:
        None if it would change something: with several processes, which would have to agree, and with optimizers that
        work in the backward pass.

    Raises:
        SystemExit: code 1, if memory runs out. The message names the rows.
    """
    training, size, device = args.training, trainer.state.train_batch_size, args.training.device
    if training.world_size > 1 or training.optim.endswith(IN_BACKWARD):
        return None
    lengths = np.array(row_lengths(trainer.train_dataset))
    order = lengths.argsort(kind="stable")
    middle = int(np.searchsorted(lengths[order], lengths.mean())) - size // 2
    start = max(0, min(middle, len(order) - size))
    longest, usual = order[-size:], order[start : start + size]
    shown = ", ".join(str(trainer.train_dataset[int(row)]["row_number"]) for row in longest[::-1][:MOST_ROWS])
    shown += ", ..." if len(longest) > MOST_ROWS else ""
    place = f"on the longest rows ({shown}: up to {lengths.max():,} tokens)"
    remedies = memory_flags(args, int(lengths.max())).values()
    # without advice the Trainer itself tries smaller batches
    advice = nullcontext() if training.auto_find_batch_size else memory_advice(device, remedies, place)
    with advice, torch.random.fork_rng([device] if device.type == "cuda" else []):
        for rows in (longest, usual):
            seconds = take_pass(trainer, [trainer.train_dataset[int(row)] for row in rows])
            seconds *= lengths.mean() / lengths[rows].mean()
            trainer.model.zero_grad()
    trainer.not_finite_guard.forwards.clear()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return Rehearsal(
        longest=int(lengths.max()),
        peak=peak_reserved(device) + OPTIMIZER * trained,
        seconds=seconds * training.gradient_accumulation_steps,
    )
