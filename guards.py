"""Callbacks that watch a training run."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from console import fail

# With fp16 the first gradients overflow until the loss scale has come down: normal, but not for this many logs.
FP16_OVERFLOWS = 5


class NotFiniteGuard(TrainerCallback):
    """Stop the run at the first logged loss or gradient norm that is NaN or infinite.

    A checkpoint is only written after a log of the same step, so that every checkpoint is a good one.
    """

    def __init__(self) -> None:
        self.overflows = 0  # logs in a row

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
                    f"step {state.global_step}: {name} is {value}: training stops and no adapter is saved; "
                    f"checkpoints in {args.output_dir} are from before.\nTry {advice}",
                    code=1,
                )
