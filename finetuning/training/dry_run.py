"""What a run needs, measured before it starts: a dry run measures each part, the rehearsal begins a run on a GPU.

The longest rows need the most memory. A run that does not fit ends in its first seconds, and not hours later when it
meets them. Nothing of a rehearsal stays: no gradient, no loss, no random number that was drawn.
"""

import copy
import math
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from finetuning.cli.console import describe_duration, fact, say
from finetuning.cli.memory import (
    GIB,
    is_out_of_memory,
    memory_advice,
    memory_of_others,
    peak_memory,
    peak_reserved,
    reset_peak_memory,
    total_memory,
    used_memory,
)
from finetuning.model.fingerprint import quantization
from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.training.collators import row_lengths
from finetuning.training.flags import Arguments, memory_flags
from finetuning.training.memory import OPTIMIZER, Need, compute_step, count_kept_bytes, measure_size
from finetuning.training.trainer import FineTuningTrainer, make_trainer

FEW_TOKENS = 16  # to count on
MOST_ROWS = 4  # named in a message
IN_BACKWARD = ("layerwise", "lomo")  # endings of optimizers that change the weights in the backward pass


class Measurement(NamedTuple):
    """What a step on some rows took, in bytes."""

    before: int  # in use when it began
    training: int  # gradients and the optimizer's states
    activations: float
    logits: float
    reserved: int  # what PyTorch keeps for later, beside what is in use
    kept: float  # by a token for the backward pass, without checkpointing
    undropped: float  # the same without dropout
    seconds: float | None  # None if memory ran out, so that activations and logits are computed

    def peak(self) -> float:
        return self.before + self.training + self.activations + self.logits + self.reserved


# ---- measure a step


def measure(
    model: PeftModel, pad_token_id: int, rows: list[dict[str, Any]], training_args: TrainingArguments
) -> Measurement:
    """Take a step on the rows, in a run that has no others and writes nothing."""
    args = copy.copy(training_args)
    args.num_train_epochs, args.max_steps = 0, -1
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.load_best_model_at_end = [], False
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = make_trainer(model, pad_token_id, args, Dataset.from_list(rows))
        meter = Meter(trainer, rows)
        trainer.add_callback(meter)
        trainer.train()
    return meter.measurement


class Meter(TrainerCallback):
    """Measures a step on the rows, before those of a run; if memory runs out, what it needs is computed."""

    def __init__(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        self.trainer = trainer
        self.rows = rows

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        trainer, before = self.trainer, used_memory(args.device)
        training = make_optimizer_states(trainer)
        kept = count_kept(trainer), count_kept(trainer, dropout=False)
        try:
            activations, logits, reserved, seconds = measure_passes(trainer, self.rows)
            activations = max(0, activations - before - training)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = sum(len(row["input_ids"]) for row in self.rows)
            size = measure_size(trainer.model.get_base_model())
            need = compute_step(size, kept[0], tokens, 0, args.gradient_checkpointing)
            activations, logits, reserved, seconds = need.activations, need.logits, 0, None
        self.measurement = Measurement(before, training, activations, logits, reserved, *kept, seconds)


def measure_passes(trainer: Trainer, rows: list[dict[str, Any]]) -> tuple[int, int, int, float]:
    """Measure two passes on the rows: a warm-up with one supervised token of each, which has all but the other logits.

    Returns the peak without the logits, theirs, what PyTorch keeps beside the peak, and the seconds of the second pass.
    """
    peaks, reserved = [], []
    one = [row | {"labels": [IGNORE_INDEX] * (len(row["labels"]) - 1) + row["input_ids"][-1:]} for row in rows]
    for batch in (one, rows):
        reset_peak_memory(trainer.args.device)
        seconds = take_pass(trainer, batch)
        peaks.append(peak_memory(trainer.args.device))
        reserved.append(peak_reserved(trainer.args.device))
        trainer.model.zero_grad()
    return peaks[0], max(0, peaks[1] - peaks[0]), max(reserved) - max(peaks), seconds


def make_optimizer_states(trainer: Trainer) -> int:
    """Let the optimizer make its states, by a step without gradients; returns their bytes and those of the gradients.

    It is the optimizer alone that steps: fp16's loss scaling skips steps until its scale has come down, and of a
    skipped step there are no states.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trainer.model.zero_grad()
    states = [state for states in optimizer.state.values() for state in states.values()]
    return sum(tensor.nbytes for tensor in [*trained, *states] if isinstance(tensor, torch.Tensor))


def take_pass(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    """Take the forward and the backward pass of a batch, which leave their gradients; returns the seconds they took."""
    (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
    begin = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, batch, count)
    if trainer.args.device.type != "cpu":
        torch.accelerator.synchronize(trainer.args.device)
    return time.perf_counter() - begin


def count_kept(trainer: Trainer, dropout: bool = True) -> float:
    """The bytes that a token keeps for the backward pass, without checkpointing: a difference, in which weights cancel.

    Nothing is trained. With checkpointing in use, dropout does not count.
    """
    device, sizes = trainer.args.device, []
    # in the other mode neither of the two is at work
    trainer.model.train(dropout and not trainer.args.gradient_checkpointing)
    for tokens in (FEW_TOKENS, 2 * FEW_TOKENS):
        batch = send_to_device(trainer.data_collator([dict.fromkeys(("input_ids", "labels"), [0] * tokens)]), device)
        del batch["labels"]  # no loss
        sizes.append(count_kept_bytes(lambda batch=batch: trainer.model_wrapped(**batch)))
    trainer.model.train()
    return (sizes[1] - sizes[0]) / FEW_TOKENS


# ---- the dry run


def print_plan(model: PeftModel, pad_token_id: int, train_dataset: Dataset, args: Arguments) -> None:
    """Take a step on the longest rows; print the memory of each part, whether it fits, and the time of the run."""
    lengths = row_lengths(train_dataset)
    longest = np.argsort(lengths, kind="stable")[-args.training.per_device_train_batch_size :]
    rows = [train_dataset[int(number)] for number in longest]
    tokens = sum(len(row["input_ids"]) for row in rows)
    learnt = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    step = measure(model, pad_token_id, rows, args.training)

    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    say(f"memory of a step on the {len(rows)} longest rows ({tokens:,} tokens, {learnt:,} of them learnt), in GiB:")
    device, fitted = args.training.device, step.seconds is not None
    on_cpu, others, total = device.type == "cpu", memory_of_others(device), total_memory(device)
    parts = {
        "base weights": weights,
        "adapter, gradients, optimizer": adapter + step.training,
        "activations": step.activations,
        "logits": step.logits,
        "Python and its libraries" if on_cpu else "other": step.before - weights - adapter,
        "kept by PyTorch for later": step.reserved,
        "peak": step.peak(),
        "other programs" if on_cpu else "other programs, and CUDA itself": others,
        "this machine has" if on_cpu else "this GPU has": total,
    }
    for name, size in parts.items():
        computed = name in ("activations", "logits", "peak") and not fitted
        source = "computed, as memory ran out" if computed else "measured"
        say(f"  {name:32} {max(0, size) / GIB:8.2f}  {source}")
    if fitted and step.peak() <= total - others:
        say("it fits")
    else:
        say(f"it does not fit into the {(total - others) / GIB:.2f} GiB that are free. The peak with other flags:")
        free = min(total - others, step.peak() - 1)  # memory may run out before the device is full
        print_remedies(model, [lengths[number] for number in longest], args, step, free)
    print_duration(lengths, args.training, step.seconds / tokens if fitted else None)


def print_remedies(model: PeftModel, lengths: list[int], args: Arguments, step: Measurement, free: int) -> None:
    """Print what the peak would be with the flags that save memory: with each and, if none is enough, with several.

    What was measured changes as what `compute_step` gives: activations by proportion, weights by the difference.

    Args:
        lengths: of the rows of the step, in tokens.
        free: bytes that the peak must fit into.
    """
    flags, size = memory_flags(args, max(lengths)), measure_size(model.get_base_model())
    if quantization(model):
        flags.pop("4 bits", None)

    def need(names: list[str]) -> Need:
        most = max(lengths) // 2 if "half length" in names else max(lengths)
        rows = [max(lengths)] if "one row" in names else lengths
        return compute_step(
            size,
            step.undropped if "no dropout" in names else step.kept,
            sum(min(length, most) for length in rows),
            trained=0,
            checkpointing=args.training.gradient_checkpointing or "checkpointing" in names,
            offload="offload" in names,
            in_4bit="4 bits" in names,
        )

    def peak(names: list[str]) -> float:
        now, new = need([]), need(names)
        weights = new.weights + new.unpacked - now.weights - now.unpacked
        return step.peak() + step.activations * (new.activations / now.activations - 1) + weights

    choices = [[name] for name in flags]
    if not any(peak(choice) <= free for choice in choices):
        choices += [list(flags)[:count] for count in range(2, len(flags) + 1)]
    for choice in choices:
        verdict = "fits" if peak(choice) <= free else "too much"
        say(f"  {peak(choice) / GIB:8.2f}  computed, {verdict:8}  {' '.join(flags[name] for name in choice)}")
    if not any(peak(choice) <= free for choice in choices):
        say("none of this is enough: take a smaller model, or a device with more memory")


def print_duration(lengths: list[int], args: TrainingArguments, seconds_per_token: float | None) -> None:
    """Print the steps of the run and, if a token's is known, its time, from the lengths of its rows in tokens."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(lengths) / rows) * args.num_train_epochs)
    tokens = min(rows, len(lengths)) * sum(lengths) / len(lengths)  # of a step
    duration = f", about {describe_duration(steps * tokens * seconds_per_token)}" if seconds_per_token else ""
    say(f"the run: {len(lengths):,} rows, {steps:,} steps of {rows} rows{duration}")


# ---- the rehearsal


def is_worth_rehearsing(device: torch.device) -> bool:
    """Whether a pass is cheap beside a run. On a CPU it costs as much as a step, and its memory is computed."""
    return device.type != "cpu"


class Rehearsal(TrainerCallback):
    """Prints the memory that a run needs, before its first step: measured in a pass on a batch of the longest rows.

    If memory runs out, the message names the rows. On a CPU the memory is computed instead. With several processes,
    which would have to agree, and with optimizers that work in the backward pass, nothing is done.

    Args:
        remedies: flags that save memory.
    """

    def __init__(self, trainer: FineTuningTrainer, remedies: Iterable[str]) -> None:
        self.trainer = trainer
        self.remedies = remedies

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        device, model = args.device, self.trainer.model
        used, free = used_memory(device), total_memory(device) - memory_of_others(device)
        is_at_end = state.global_step >= state.max_steps
        if is_at_end or args.world_size > 1 or args.optim.endswith(IN_BACKWARD):
            fact("memory", f"{used / GIB:.2f} GiB in use, {(free - used) / GIB:.2f} free")
            return
        # after a resume the state names the batch of the run that wrote the checkpoint
        count = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
        lengths = np.array(row_lengths(self.trainer.train_dataset))
        longest = lengths.argsort(kind="stable")[::-1][:count]
        trained = OPTIMIZER * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows = f"the longest rows (up to {lengths.max():,} tokens)"
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if is_worth_rehearsing(device):
                seconds = self.take_pass(longest.tolist(), args) * lengths.mean() / lengths[longest].mean()
                steps = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
                fact("time", f"at most {describe_duration(seconds * steps)}, without evaluation; first passes are slow")
                peak, how = peak_reserved(device) + trained, "measured on"
            else:
                size, tokens = measure_size(model.get_base_model()), int(lengths[longest].sum())
                need = compute_step(size, count_kept(self.trainer), tokens, 0, args.gradient_checkpointing)
                peak, how = used + trained + need.activations + need.logits, "computed for"
        fact("memory", f"{peak / GIB:.2f} GiB of {free / GIB:.2f}, {how} {rows}")

    def take_pass(self, rows: list[int], args: TrainingArguments) -> float:
        """Take a pass on the rows, of which only the peak of the memory stays; returns the seconds it took."""
        examples = [self.trainer.train_dataset[row] for row in rows]
        shown = ", ".join(str(example["row_number"]) for example in examples[:MOST_ROWS])
        shown += ", ..." if len(rows) > MOST_ROWS else ""
        activity = f"on the longest rows ({shown}: up to {examples[0]['length']:,} tokens)"
        # without advice the Trainer itself tries smaller batches
        with nullcontext() if args.auto_find_batch_size else memory_advice(args.device, self.remedies, activity):
            seconds = take_pass(self.trainer, examples)
        self.trainer.model.zero_grad()
        self.trainer.not_finite_guard.forwards.clear()
        return seconds
