"""Callbacks that watch a training run."""

import math
import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.cli.commands import resume_command
from finetuning.cli.console import announce, fail, is_main_process
from finetuning.model.folder import last_complete

# With fp16, gradients overflow until the loss scale has come down from 65,536, and the optimizer skips those steps. If
# they still do at a scale of 1, the gradients themselves are too large.
SMALLEST_LOSS_SCALE = 1
# Below this loss of a token the answers are learnt, and float16 may have no number left for their gradient.
LEARNT = 1e-3
MOST_ROWS = 16  # named in a message
MOST_LOSSES = 1024  # that wait for a log


class StopOnSignal(TrainerCallback):
    """Lets Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; a second signal ends it at once.

    Several processes tell each other after each step which signal they have caught, and so stop at the same step. They
    do it on the CPU, so that nothing waits for the GPUs.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught = 0  # the number of the signal
        self.process = os.getpid()
        self.before: dict[int, Any] = {}  # the handlers that were there

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if self.before:  # the Trainer begins anew after `--auto_find_batch_size` has halved the batch
            return
        self.group = dist.new_group(backend="gloo") if args.world_size > 1 else None
        self.before = {number: signal.signal(number, self.catch) for number in self.SIGNALS}

    def on_train_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker of the data loader, which has inherited this handler
            return
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number
        if is_main_process():
            # not printed: a signal may come in the middle of a print, and streams refuse another
            with suppress(OSError):
                os.write(2, b"\nstopping after this step, with a checkpoint (once more: stop at once)\n")

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.group:
            caught = torch.tensor(self.caught)
            dist.all_reduce(caught, dist.ReduceOp.MAX, self.group)
            self.caught = int(caught)
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End an epoch that a signal has cut short without its evaluation, which is due when it is complete."""
        if self.caught and state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False

    def exit_if_caught(self) -> None:
        """End the program with the exit code that a shell expects after a signal: 130 or 143."""
        if not self.caught:
            return
        if is_main_process():
            announce(f"stopped by {signal.Signals(self.caught).name}; resume with:\n{resume_command()}")
        if self.group:
            dist.barrier(self.group)  # torchrun ends all others when the first one exits,
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and they shall end by themselves, with the same code
        raise SystemExit(128 + self.caught)


class NotFiniteGuard(TrainerCallback):
    """Stops the run at the first logged loss or gradient norm that is NaN or infinite, and names the rows it came from.

    Also at a gradient norm of 0 in a step with something to learn.

    Losses stay on their device until the next log, so that no step has to wait for the GPU. A checkpoint is written
    only after a log of the same step, so every checkpoint is a good one.

    Args:
        scaler: of the loss; None without fp16, and with DeepSpeed, which has a smallest scale of its own.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler
        self.step = 1  # the step in progress
        self.forwards: list[tuple[int, list[int], torch.Tensor]] = []  # step, row numbers, loss

    def record(self, row_numbers: list[int], loss: torch.Tensor) -> None:
        """Keep the loss of a training batch and the numbers of its rows until the next log."""
        self.forwards.append((self.step, row_numbers, loss))

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1
        if len(self.forwards) > MOST_LOSSES:  # logs are rare
            self.forwards = [forward for forward in self.forwards if not forward[2].isfinite()][:MOST_ROWS]

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        values = {name: logs[name] for name in ("loss", "eval_loss", "grad_norm") if name in logs}
        for name, value in values.items():
            if not math.isfinite(value):
                if name == "grad_norm" and args.fp16 and not self.scale_is_small():
                    continue
                advice = "--bf16 True, or a lower --learning_rate" if args.fp16 else "a lower --learning_rate"
                older = f"; the last checkpoint is {last}" if (last := last_complete(args.output_dir)) else ""
                source = self.find_source(state.global_step)
                fail(f"{source}: {name} is {value}: training stops and saves no adapter{older}.\nTry {advice}", code=1)
        if values.get("grad_norm") == 0 and self.has_something_to_learn(args, state.global_step):
            fail(
                f"step {state.global_step}: the gradient norm is 0, so nothing is learnt: training stops and saves no "
                "adapter.\nIs the adapter frozen, is there a kernel without gradient (for 4-bit weights?), or is the "
                "--learning_rate far too high?",
                code=1,
            )
        if "loss" in logs:
            self.forwards.clear()

    def has_something_to_learn(self, args: TrainingArguments, step: int) -> bool:
        """Whether all processes together had a loss in the step: rows without supervised tokens, for one, have none.

        In float16, DeepSpeed gives a norm of 0 until the first step without an overflow.
        """
        if args.fp16 and self.scaler is None:
            return False
        return sum(gather_object([loss.item() for its_step, _, loss in self.forwards if its_step == step])) > LEARNT

    def scale_is_small(self) -> bool:
        """Whether the loss scale, halved after the overflow, was 1 or less. Reading it waits for the GPU."""
        return self.scaler is not None and self.scaler.get_scale() < SMALLEST_LOSS_SCALE

    def find_source(self, last_step: int) -> str:
        """The step and the rows of the first losses that are not finite, or of the last step if all losses are finite.

        The logged value is the mean of all processes, so that each of them comes here, and one has the rows.
        """
        bad = gather_object([(step, rows) for step, rows, loss in self.forwards if not loss.isfinite()])
        last = gather_object([(step, rows) for step, rows, _ in self.forwards if step == last_step])
        step = min(bad)[0] if bad else last_step
        numbers = [number for its_step, rows in bad or last if its_step == step for number in rows]
        shown = ", ".join(map(str, sorted(numbers)[:MOST_ROWS])) + (", ..." if len(numbers) > MOST_ROWS else "")
        return f"step {step}" + (f" (rows {shown} of the data file)" if numbers else "")
