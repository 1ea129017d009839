"""What a run needs, known before it starts: the dry run measures each part, the rehearsal is a run's own beginning.

The longest rows need the most memory. A run that does not fit ends in its first seconds, and not hours later when it
meets them; and its time is known. Nothing of a rehearsal stays: no gradient, no loss, no random number that was drawn.
"""

import copy
import math
import tempfile
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import release_memory
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from finetuning.cli.console import describe_duration, say
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
from finetuning.training.trainer import make_trainer

BYTES_IN_4BIT = 0.55  # of a weight, with its share of the scales and of the one matrix that is in half precision
FEWEST_TOKENS = 16  # to measure on
UNRETURNED = 2**27  # bytes still in use after memory ran out, above which nothing can be measured: common on a CPU
MOST_ROWS = 4  # named in a message
OPTIMIZER = 8  # bytes of a trained weight: the two numbers of AdamW
IN_BACKWARD = ("layerwise", "lomo")  # endings of optimizers that change the weights in the backward pass


class Rehearsal(NamedTuple):
    longest: int  # row, in tokens
    peak: int  # bytes: the most memory that the run will need
    seconds: float  # of a step


class Measurement(NamedTuple):
    """What steps on some rows took, in bytes."""

    tokens: int  # of the rows
    before: int  # in use when they began
    training: int  # gradients and the optimizer's states
    activations: int
    logits: int
    kept: int  # what PyTorch keeps for later, beside what is in use
    seconds: float  # of a step

    def peak(self) -> int:
        return self.before + self.training + self.activations + self.logits + self.kept

    def scaled(self, tokens: int) -> "Measurement":
        """For other rows, by proportion: activations and time."""
        factor = tokens / self.tokens
        return self._replace(tokens=tokens, activations=int(self.activations * factor), seconds=self.seconds * factor)


def print_plan(model: PeftModel, pad_token_id: int, train_dataset: Dataset, args: Arguments) -> None:
    """Take a few steps on the longest rows; print the memory of each part, whether it fits, and the time of the run."""
    lengths = row_lengths(train_dataset)
    longest = np.argsort(lengths, kind="stable")[-args.training.per_device_train_batch_size :]
    rows = [train_dataset[int(number)] for number in longest]
    tokens, learnt = count_tokens(rows), sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    measured = measure(model, pad_token_id, rows, args.training)
    step = measured.scaled(tokens)

    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    say(f"memory of a step on the {len(rows)} longest rows ({tokens:,} tokens, {learnt:,} of them learnt), in GiB:")
    device, fitted = args.training.device, measured.tokens == tokens
    on_cpu, others, total = device.type == "cpu", memory_of_others(device), total_memory(device)
    parts = {
        "base weights": weights,
        "adapter, gradients, optimizer": adapter + step.training,
        "activations": step.activations,
        "logits": step.logits,
        "Python and its libraries" if on_cpu else "other": step.before - weights - adapter,
        "kept by PyTorch for later": step.kept,
        "peak": step.peak(),
        "other programs" if on_cpu else "other programs, and CUDA itself": others,
        "this machine has" if on_cpu else "this GPU has": total,
    }
    for name, size in parts.items():
        computed = name in ("activations", "peak") and not fitted
        source = f"computed, as only {measured.tokens:,} of the tokens fit" if computed else "measured"
        say(f"  {name:32} {max(0, size) / GIB:8.2f}  {source}")
    if fitted and step.peak() <= total - others:
        say("it fits")
    else:
        say(f"it does not fit into the {(total - others) / GIB:.2f} GiB that are free. The peak with other flags:")
        free = min(total - others, step.peak() - 1)  # memory may run out before the device is full
        print_remedies(model, [lengths[number] for number in longest], args, step, free)
    print_duration(lengths, args.training, step.seconds / tokens)


def print_remedies(model: PeftModel, lengths: list[int], args: Arguments, step: Measurement, free: int) -> None:
    """Print what the peak would be with the flags that save memory: with each and, if none is enough, with several.

    Args:
        lengths: of the rows of the step, in tokens.
        free: bytes that the peak must fit into.
    """
    flags = memory_flags(args, max(lengths))
    if quantization(model):
        flags.pop("4 bits", None)
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size * model.get_input_embeddings().weight.element_size()
    # A step keeps the activations of all layers, and works on about two more. With checkpointing it keeps those of one.
    inputs = layers * step.tokens * width
    checkpointed = step.activations * 3 // (layers + 2) + inputs  # and the input of each layer
    shares = {  # of the activations
        "checkpointing": min(1, checkpointed / max(1, step.activations)),
        "offload": max(0, 1 - inputs / max(1, step.activations)),
        "one row": max(lengths) / step.tokens,
        "half length": sum(min(length, max(lengths) // 2) for length in lengths) / step.tokens,
    }
    in_4bit = bytes_saved_in_4bit(model)

    def peak(names: list[str]) -> float:
        saved = step.activations * (1 - math.prod(shares.get(name, 1) for name in names))
        return step.peak() - saved - in_4bit * ("4 bits" in names)

    choices = [[name] for name in flags]
    if not any(peak(choice) <= free for choice in choices):
        choices += [list(flags)[:count] for count in range(2, len(flags) + 1)]
    for choice in choices:
        verdict = "fits" if peak(choice) <= free else "too much"
        say(f"  {peak(choice) / GIB:8.2f}  computed, {verdict:8}  {' '.join(flags[name] for name in choice)}")
    if not any(peak(choice) <= free for choice in choices):
        say("none of this is enough: take a smaller model, or a device with more memory")


def bytes_saved_in_4bit(model: PeftModel) -> int:
    """How much smaller the base weights would be in 4 bits: those of linear layers, apart from the vocabulary's."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    weights = [m.weight for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return int(sum(w.nbytes - BYTES_IN_4BIT * w.numel() for w in weights if not w.requires_grad))


def measure(
    model: PeftModel, pad_token_id: int, rows: list[dict[str, Any]], training_args: TrainingArguments
) -> Measurement:
    """Take steps on the rows, in a run that has no others and writes nothing."""
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
    """Takes steps on the rows, before those of a run, or on half of them if memory runs out, and so on."""

    def __init__(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        self.trainer = trainer
        self.rows = rows

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        before = used_memory(args.device)
        while True:
            try:
                self.measurement = take_steps(self.trainer, self.rows, before)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)  # and not the error itself, which holds on to the step's tensors
            self.trainer.model.zero_grad()
            release_memory()
            if count_tokens(self.rows) < FEWEST_TOKENS or used_memory(args.device) > before + UNRETURNED:
                raise MemoryError(reason)
            self.rows = halve(self.rows)


def take_steps(trainer: Trainer, rows: list[dict[str, Any]], before: int) -> Measurement:
    """Measure the parts: differences, as a step that learns one token of each row needs all but the other logits.

    Args:
        before: bytes in use before the first step.
    """
    device, peaks, reserved = trainer.args.device, [], []
    one = [row | {"labels": [IGNORE_INDEX] * (len(row["labels"]) - 1) + row["input_ids"][-1:]} for row in rows]
    for batch in (one, one, rows, rows):
        reset_peak_memory(device)
        seconds = take_pass(trainer, batch)
        trainer.optimizer.step()
        peaks.append(peak_memory(device))
        reserved.append(peak_reserved(device))
        trainer.model.zero_grad()
    training = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    training += sum(value.nbytes for value in states if isinstance(value, torch.Tensor))  # Adafactor also has numbers
    return Measurement(
        tokens=count_tokens(rows),
        before=before,
        training=training,
        activations=max(0, peaks[1] - before - training),
        logits=max(0, max(peaks) - peaks[1]),
        kept=max(reserved) - max(peaks),
        seconds=seconds,
    )


def take_pass(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    """Take the forward and the backward pass of a batch, which leave their gradients; returns the seconds they took."""
    (batch,), count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
    begin = time.perf_counter()
    trainer.training_step(trainer.model_wrapped, batch, count)
    if trainer.args.device.type != "cpu":
        torch.accelerator.synchronize(trainer.args.device)
    return time.perf_counter() - begin


def halve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The second half of the rows; of a single row its second half, where the answer is."""
    if len(rows) > 1:
        return rows[len(rows) // 2 :]
    return [rows[0] | {name: rows[0][name][len(rows[0][name]) // 2 :] for name in ("input_ids", "labels")}]


def count_tokens(rows: list[dict[str, Any]]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def print_duration(lengths: list[int], args: TrainingArguments, seconds_per_token: float) -> None:
    """Print the steps of the run and an estimate of its time, from the lengths of its rows in tokens."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(lengths) / rows) * args.num_train_epochs)
    tokens = min(rows, len(lengths)) * sum(lengths) / len(lengths)  # of a step
    duration = describe_duration(steps * tokens * seconds_per_token)
    say(f"the run: {len(lengths):,} rows, {steps:,} steps of {rows} rows, about {duration}")


def rehearse(trainer: Trainer, args: Arguments) -> Rehearsal | None:
    """Take the forward and the backward pass of a batch of the longest rows and of one of usual rows, and measure them.

    If memory runs out, the message names the rows. Returns None if it would change something: with several processes,
    which would have to agree, and with optimizers that work in the backward pass.
    """
    training, device = args.training, args.training.device
    if training.world_size > 1 or training.optim.endswith(IN_BACKWARD):
        return None
    # after a resume the state names the batch of the run that wrote the checkpoint
    size = trainer.state.train_batch_size if training.auto_find_batch_size else training.train_batch_size
    lengths = np.array(row_lengths(trainer.train_dataset))
    order = lengths.argsort(kind="stable")
    middle = int(np.searchsorted(lengths[order], lengths.mean())) - size // 2
    start = max(0, min(middle, len(order) - size))
    longest, usual = order[-size:], order[start : start + size]
    shown = ", ".join(str(trainer.train_dataset[int(row)]["row_number"]) for row in longest[::-1][:MOST_ROWS])
    shown += ", ..." if len(longest) > MOST_ROWS else ""
    activity = f"on the longest rows ({shown}: up to {lengths.max():,} tokens)"
    remedies = memory_flags(args, int(lengths.max())).values()
    # without advice the Trainer itself tries smaller batches
    advice = nullcontext() if training.auto_find_batch_size else memory_advice(device, remedies, activity)
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
