"""The flags that say which rows are read, how, and what becomes of them."""

from dataclasses import dataclass

from finetuning.cli.arguments import beside_scripts, flag, renamed_fields


@dataclass
class DataArguments:
    _argument_group_name = "data and output"

    data_path: str = flag(
        beside_scripts("data/train.json"),
        "rows to train on: a JSON, JSON Lines, CSV, TSV or Parquet file, a folder, a pattern, "
        "hf://datasets/owner/name/file, or several with commas between",
    )
    eval_data_path: str | None = flag(
        None, "rows to evaluate on: the loss after every epoch (or see --eval_strategy), and the metrics at the end"
    )
    eval_split: float = flag(0.0, "share of the rows of data_path to hold out and evaluate on")
    max_rows: int | None = flag(None, "read only so many rows of data_path, the first")
    instruction_field: str | None = flag(None, "what the field instruction is called in the data, such as question")
    input_field: str | None = flag(None, "what the field input is called in the data, such as context")
    output_field: str | None = flag(None, "what the field output is called in the data, such as answer")
    messages_field: str | None = flag(None, "what the field messages is called in the data: conversations")
    eval_metrics: bool = flag(True, "after training, answer the rows of eval_data_path and score the answers")
    max_length: int = flag(1024, "longest row, in tokens; longer rows are cut at the end")
    prompt_format: str = flag(
        "auto",
        "chat: the model's own template; plain: Instruction, Input, Output; auto: chat for instruct models, else plain",
        choices=["auto", "chat", "plain"],
    )
    thinking: str = flag(
        "auto",
        "auto: rows with a thought in thinking mode, the others without; the adapter is asked as most rows are; "
        "on: it is asked to think; off: thoughts are left out",
        choices=["auto", "on", "off"],
    )
    preprocessing_num_workers: int | None = flag(None, "processes that tokenise a large file (default: one a core)")
    token_cache_dir: str | None = flag(
        None, "folder for the tokens of large files, to start faster the next time (default: in the cache of datasets)"
    )
    token_cache_gb: float = flag(50.0, "size that the token cache may grow to, in GB; the oldest is then removed")
    overwrite_output_dir: bool = flag(False, "replace the adapter and the checkpoints in --output_dir")
    dry_run: bool = flag(False, "measure the memory that the longest rows need, and the time of the run; train nothing")
    sample_answers: int = flag(
        3, "after training, show so many rows with the answers of the base model and of the adapter; 0 for none"
    )
    show_rows: int = flag(
        0,
        "print so many rows as the model gets them, with their tokens and what is learnt; load no model, train nothing",
    )
    keep_checkpoints: bool = flag(False, "keep the checkpoints of a finished run; each is about as large as 3 adapters")

    def __post_init__(self) -> None:
        renamed_fields(self)
        if self.max_length < 2:
            raise ValueError(f"--max_length {self.max_length}: a row needs at least 2 tokens, a prompt and an answer")
        if not 0 <= self.eval_split < 1:
            raise ValueError(f"--eval_split {self.eval_split}: a share of the rows, for example 0.02")
        if self.eval_split and self.eval_data_path:
            raise ValueError("--eval_split and --eval_data_path both name rows to evaluate on: leave one of them out")
        if self.show_rows < 0:
            raise ValueError(f"--show_rows {self.show_rows}: a number of rows, such as 5")
        for name in ("max_rows", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")

    def has_eval_rows(self) -> bool:
        return bool(self.eval_data_path or self.eval_split)
