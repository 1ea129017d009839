"""What a run prints: the first row before it starts; when it is done, what it took and what to try next."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.cli.console import say
from finetuning.cli.memory import GIB, peak_reserved
from finetuning.preprocessing.prompts import mark_answers
from finetuning.preprocessing.templates import prompt_format
from finetuning.preprocessing.token_dataset import row_lengths


def print_first_row(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    say(f"prompt format: {prompt_format(tokenizer)}; the first row, as the model reads it and learns to write it:")
    say(mark_answers(dataset[0]["input_ids"], dataset[0]["labels"], tokenizer))


def print_speed(
    metrics: dict[str, float], share: float, train_dataset: Dataset, output_dir: str, device: torch.device
) -> None:
    """Print time, tokens a second and peak memory.

    Args:
        metrics: of the Trainer's result. Its speed counts all steps of the run.
        share: of the steps that were taken now; the others were taken before the run was resumed.
    """
    tokens_per_row = sum(row_lengths(train_dataset)) / len(train_dataset)
    tokens_per_second = metrics["train_samples_per_second"] * share * tokens_per_row
    say(
        f"trained in {metrics['train_runtime']:.0f} s, {tokens_per_second:,.0f} tokens/s, "
        f"peak memory {peak_reserved(device) / GIB:.2f} GiB; saved in {output_dir}"
    )


def print_next_command(output_dir: str) -> None:
    say("Try it:")
    say(f'{inference_command(output_dir)} --instruction "翻译为英文" --input "早安"')


def inference_command(output_dir: str) -> str:
    return f"python {Path(sys.argv[0]).with_name('inference.py')} --adapter_path {output_dir}"


def scoring_command(output_dir: str, data_path: str) -> str:
    return f"{inference_command(output_dir)} --data_path {data_path}"
