"""What a run shows while it trains: a bar on a terminal, and there and in a file a line every --logging_steps."""

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from finetuning.cli.console import cyan, describe_duration, fact, say
from finetuning.cli.memory import GIB, memory_of_others, peak_reserved, total_memory, used_memory
from finetuning.training.collators import row_lengths
from finetuning.training.dry_run import Rehearsal, rehearse
from finetuning.training.flags import Arguments
from finetuning.training.trainer import FineTuningTrainer

COLUMNS = "   step  epoch      loss  grad norm  learning rate  tokens/s     GiB      left"
BAR = "{percentage:3.0f}%|{bar}| {n:,} of {total:,} steps, {elapsed} < {remaining}{postfix}"


class ProgressLog(TrainerCallback):
    """Rehearses a step; then shows steps, losses, speed, the most memory so far and the time that is left."""

    def __init__(self, trainer: FineTuningTrainer, args: Arguments) -> None:
        self.trainer = trainer
        self.args = args
        lengths = row_lengths(trainer.train_dataset)
        self.tokens_per_row = sum(lengths) / len(lengths)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_step = rows * self.tokens_per_row
        self.first_step, self.evaluated = state.global_step, 0
        print_steps(args, state, rows, self.tokens_per_step, rehearse(self.trainer, self.args))
        say(f"\n{COLUMNS}")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=BAR,
            dynamic_ncols=True,
            leave=False,
            disable=args.disable_tqdm or not state.is_world_process_zero or None,  # None: only on a terminal
        )
        self.start(args, state)
        self.seconds = 0.0  # of the steps so far

    def start(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Measure the speed from here on: evaluations and checkpoints do not count."""
        self.since, self.since_step = time.perf_counter(), state.global_step

    on_save = start

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        step = f"{state.global_step:7,} {state.epoch:6.2f}"
        if "eval_loss" in logs:
            say(cyan(f"{step} {logs['eval_loss']:9.4f}  evaluation, {describe_duration(logs['eval_runtime'])}"))
        if "loss" not in logs:
            return
        steps, seconds = state.global_step - self.since_step, time.perf_counter() - self.since
        self.seconds += seconds
        done = state.global_step - self.first_step
        # the first step takes longer than the others
        left = describe_duration(self.seconds / done * (state.max_steps - state.global_step)) if done > 1 else ""
        say(
            f"{step} {logs['loss']:9.4f} {logs.get('grad_norm', 0):10.3g} {logs['learning_rate']:14.3g} "
            f"{steps * self.tokens_per_step / seconds:9,.0f} {peak_reserved(args.device) / GIB:7.2f} {left:>9}"
        )
        self.start(args, state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.evaluated += 1
        self.bar.set_postfix_str(f"evaluating {self.evaluated:,} of {len(eval_dataloader):,}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self.evaluated = 0
        self.bar.set_postfix_str("")
        self.start(args, state)

    def on_train_end(self, *rest: Any, **kwargs: Any) -> None:
        self.bar.close()


def print_steps(
    args: TrainingArguments, state: TrainerState, rows: int, tokens: float, rehearsal: Rehearsal | None
) -> None:
    """Print the run's steps (of so many rows and tokens), its time, and the memory that it needs or, else, has."""
    saves = f"; a checkpoint every {state.save_steps:,} steps" if args.save_strategy == "steps" else ""
    resumed = f" from step {state.global_step:,}" if state.global_step else ""
    fact("steps", f"{state.max_steps:,}{resumed}, of {rows:,} rows (about {tokens:,.0f} tokens){saves}")
    used, free = used_memory(args.device), total_memory(args.device) - memory_of_others(args.device)
    if rehearsal:
        duration = describe_duration(rehearsal.seconds * (state.max_steps - state.global_step))
        fact("time", f"about {duration}, without evaluation")
        peak, longest = rehearsal.peak / GIB, rehearsal.longest
        fact("memory", f"{peak:.2f} GiB of {free / GIB:.2f}, measured on the longest rows (up to {longest:,} tokens)")
    else:
        fact("memory", f"{used / GIB:.2f} GiB in use, {(free - used) / GIB:.2f} free")
