"""The flags that say which rows are read, and how."""

import os
from dataclasses import dataclass

from finetuning.cli.arguments import beside_scripts, flag

FORMATS = ("auto", "chat", "plain")


@dataclass
class FieldArguments:
    instruction_field: str | None = flag(None, "what the field instruction is called in the data, such as question")
    input_field: str | None = flag(None, "what the field input is called in the data, such as context")
    output_field: str | None = flag(None, "what the field output is called in the data, such as answer")
    messages_field: str | None = flag(None, "what the field messages is called in the data: conversations")

    def __post_init__(self) -> None:
        fields = list(filter(None, (self.instruction_field, self.input_field, self.output_field)))
        if self.messages_field and fields:
            raise ValueError("--messages_field names whole conversations: leave out the other --..._field flags")
        if len(set(fields)) < len(fields):
            raise ValueError("--instruction_field, --input_field and --output_field must name different fields")

    @property
    def rename(self) -> dict[str, str]:
        """For each field that a flag names as it is called in the data, its name here: {"question": "instruction"}."""
        names = {getattr(self, f"{name}_field"): name for name in ("instruction", "input", "output", "messages")}
        return {old: new for old, new in names.items() if old is not None}


@dataclass
class DataArguments(FieldArguments):
    _argument_group_name = "data"

    data_path: str = flag(
        beside_scripts("data/train.json"),
        "rows to train on: a JSON, JSON Lines, CSV, TSV or Parquet file, a folder, a pattern, "
        "hf://datasets/owner/name/file, or several with commas between",
    )
    eval_data_path: str | None = flag(None, "rows to evaluate on: the loss after every epoch, the metrics at the end")
    eval_split: float = flag(0.0, "share of the rows of data_path to hold out and evaluate on")
    max_rows: int | None = flag(None, "read only so many rows of data_path, the first")
    max_length: int = flag(1024, "longest row, in tokens; longer rows are truncated at the end")
    prompt_format: str = flag(
        "auto",
        "chat: the model's own template; plain: Instruction, Input, Output; auto: chat for instruct models, else plain",
        choices=list(FORMATS),
    )
    thinking: str = flag(
        "auto",
        "auto: rows with reasoning in thinking mode, the others without, and inference in the mode of most rows; "
        "on: inference asks for reasoning; off: reasoning is left out",
        choices=["auto", "on", "off"],
    )
    preprocessing_num_workers: int = flag(
        min(4, os.cpu_count() or 1),
        "threads that tokenise; more than 4 gain little, as Python runs in one at a time",
    )
    token_cache_dir: str | None = flag(None, "folder for the tokens of large files (default: in the cache of datasets)")
    token_cache_gb: float = flag(50.0, "size that the token cache may grow to, in GB; the oldest is then removed")
    show_rows: int = flag(0, "print so many rows as the model gets them, with what is supervised; train nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"--max_length {self.max_length}: a row needs at least 2 tokens, a prompt and an answer")
        if not 0 <= self.eval_split < 1:
            raise ValueError(f"--eval_split {self.eval_split}: a share of the rows, for example 0.02")
        if self.eval_split and self.eval_data_path:
            raise ValueError("--eval_split and --eval_data_path both name rows to evaluate on: leave one of them out")
        if not self.preprocessing_num_workers:
            raise ValueError("--preprocessing_num_workers 0: must be at least 1")
