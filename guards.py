"""Callbacks that watch a training run."""

import math
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from console import fail, resume_command, say

# With fp16 the first gradients overflow until the loss scale has come down: normal, but not for this many logs.
FP16_OVERFLOWS = 5
MOST_ROWS = 16  # that are named in a message


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint; a second one ends it at once.

    Several processes would stop at different steps and wait for each other, so there the signals act as ever.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.caught: int | None = None

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if args.world_size == 1:
            self.before = {number: signal.signal(number, self.catch) for number in self.SIGNALS}

    def on_train_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if args.world_size == 1:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number
        say("\nstopping after this step, with a checkpoint (once more: stop at once)")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control

    def exit_if_caught(self) -> None:
        """End the program as a shell expects it after a signal: with exit code 130 or 143."""
        if self.caught:
            fail(f"stopped by {signal.Signals(self.caught).name}; go on with:\n{resume_command()}", 128 + self.caught)


class NotFiniteGuard(TrainerCallback):
    """Stop the run at the first logged loss or gradient norm that is NaN or infinite, and name the rows it came from.

    The loss of each forward is kept on its device until the next log, so that no step has to wait for the GPU. A
    checkpoint is only written after a log of the same step, so that every checkpoint is a good one.
    """

    def __init__(self) -> None:
        self.overflows = 0  # logs in a row
        self.step = 1  # the one in progress
        self.forwards: list[tuple[int, list[int], torch.Tensor]] = []  # step, row numbers, loss
        self.row_numbers: list[int] = []

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward),
        ]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def before_forward(
        self, model: torch.nn.Module, args: tuple[Any, ...], batch: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.row_numbers = batch.pop("row_numbers", [])
        return args, batch

    def after_forward(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training:
            self.forwards.append((self.step, self.row_numbers, output.loss.detach()))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step + 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        values = {name: logs[name] for name in ("loss", "eval_loss", "grad_norm") if name in logs}
        self.overflows = 0 if math.isfinite(values.get("grad_norm", 0.0)) else self.overflows + 1
        if args.fp16 and self.overflows < FP16_OVERFLOWS:
            values.pop("grad_norm", None)
        for name, value in values.items():
            if not math.isfinite(value):
                advice = "--bf16 True, or a lower --learning_rate" if args.fp16 else "a lower --learning_rate"
                fail(
                    f"{self.find_source(state.global_step)}: {name} is {value}: training stops and no adapter is "
                    f"saved; checkpoints in {args.output_dir} are from before.\nTry {advice}",
                    code=1,
                )
        if "loss" in logs:
            self.forwards.clear()

    def find_source(self, last_step: int) -> str:
        """The step and the rows of the first loss that is not finite, or else those of the last step."""
        bad = [forward for forward in self.forwards if not forward[2].isfinite()]
        step = bad[0][0] if bad else last_step
        numbers = [n for its_step, its_rows, _ in bad[:1] or self.forwards if its_step == step for n in its_rows]
        shown = ", ".join(map(str, sorted(numbers)[:MOST_ROWS])) + (", ..." if len(numbers) > MOST_ROWS else "")
        return f"step {step}" + (f" (rows {shown} of the data file)" if numbers else "")
