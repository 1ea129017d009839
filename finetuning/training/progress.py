"""What a run shows while it trains: a bar on a terminal, and there and in a file a line every --logging_steps."""

import time
from statistics import mean
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from finetuning.cli.console import cyan, describe_duration, fact, say
from finetuning.cli.memory import GIB, peak_reserved
from finetuning.training.collators import row_lengths

COLUMNS = "   step  epoch      loss  grad norm  learning rate  tokens/s     GiB      left"
BAR = "{percentage:3.0f}%|{bar}| {n:,} of {total:,} steps, {elapsed} < {remaining}{postfix}"


class ProgressLog(TrainerCallback):
    """Shows steps, losses, speed, the most memory so far and the time that is left.

    `seconds` is the time of the steps alone, without what comes before the first, evaluations and checkpoints.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, train_dataloader: DataLoader, **kwargs: Any
    ) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_step = rows * mean(row_lengths(train_dataloader.dataset))
        saves = f"; a checkpoint every {state.save_steps:,} steps" if args.save_strategy == "steps" else ""
        resumed = f" from step {state.global_step:,}" if state.global_step else ""
        tokens = f"{self.tokens_per_step:,.0f} tokens"
        fact("steps", f"{state.max_steps:,}{resumed}, of {rows:,} rows (about {tokens}){saves}")
        say(f"\n{COLUMNS}")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=BAR,
            dynamic_ncols=True,
            leave=False,
            disable=args.disable_tqdm or not state.is_world_process_zero or None,  # None: only on a terminal
        )
        self.first_step, self.evaluated, self.seconds = state.global_step, 0, 0.0
        self.logged = (state.global_step, 0.0)  # the step of the last line, and `seconds` then
        self.start()

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Count the time from here on."""
        self.since = time.perf_counter()

    on_save = start

    def count(self) -> None:
        """Add the time since the last call, or since `start`."""
        self.seconds += time.perf_counter() - self.since
        self.start()

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self.count()
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        step = f"{state.global_step:7,} {state.epoch:6.2f}"
        if "eval_loss" in logs:
            say(cyan(f"{step} {logs['eval_loss']:9.4f}  evaluation, {describe_duration(logs['eval_runtime'])}"))
        if "loss" not in logs:
            return
        self.count()  # reading the loss has waited for the GPU
        steps, seconds = state.global_step - self.logged[0], self.seconds - self.logged[1]
        done = state.global_step - self.first_step
        # the first step takes longer than the others
        left = describe_duration(self.seconds / done * (state.max_steps - state.global_step)) if done > 1 else ""
        say(
            f"{step} {logs['loss']:9.4f} {logs.get('grad_norm', 0):10.3g} {logs['learning_rate']:14.3g} "
            f"{steps * self.tokens_per_step / seconds:9,.0f} {peak_reserved(args.device) / GIB:7.2f} {left:>9}"
        )
        self.logged = (state.global_step, self.seconds)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.evaluated += 1
        self.bar.set_postfix_str(f"evaluating {self.evaluated:,} of {len(eval_dataloader):,}")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.evaluated = 0
        self.bar.set_postfix_str("")
        self.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()
