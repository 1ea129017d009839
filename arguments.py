"""The command line of the scripts: the flags they share, and one line for each mistake."""

import warnings
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from checkpoints import check_output_dir
from console import end_quietly_on_interrupt, fail, say

# Flags of other programs and of older versions of TrainingArguments, and what to use here.
OTHER_NAMES = {
    "adafactor": "--optim adafactor",
    "cutoff_len": "--max_length",
    "dataset": "--data_path",
    "evaluation_strategy": "--eval_strategy",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "include_tokens_per_second": "--include_num_input_tokens_seen True",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "lora_rank": "--lora_r",
    "lora_target": "--target_modules",
    "max_seq_length": "--max_length",
    "model_name_or_path": "--model_path",
    "no_cuda": "--use_cpu True",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "quantization_bit": "--load_in_4bit True",
    "save_safetensors": "nothing: adapters are always safetensors",
    "train_file": "--data_path",
    "use_mps_device": "nothing: the device is found by itself",
    "warmup_ratio": "--warmup_steps, where a number below 1 is a share of the run",
}


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and a docstring as it was written."""


class ScriptParser(HfArgumentParser):
    """An argument parser fed by dataclasses. A wrong command line gives one line on stderr and exit code 2."""

    def __init__(self, dataclass_types: tuple[type, ...], description: str | None) -> None:
        super().__init__(
            dataclass_types,
            description=description,
            usage="python %(prog)s [--flag value] ...",
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")

    def parse_flags(self, argv: list[str] | None = None) -> Namespace:
        """Read the command line (`sys.argv` where `argv` is None) and refuse flags that do not exist."""
        end_quietly_on_interrupt()
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' words to each other
        namespace, unknown = self.parse_known_args(argv)
        for word in unknown:
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            if not word.startswith("--"):
                fail(f"'{word}' belongs to no flag; a value with spaces needs quotes")
            if name in OTHER_NAMES:
                fail(f"{word}: no such flag here; use {OTHER_NAMES[name]}")
            near = get_close_matches(name, vars(namespace), n=1)
            fail(f"{word}: no such flag" + (f"; did you mean --{near[0]}?" if near else " (--help lists the flags)"))
        return namespace

    def to_dataclasses(self, namespace: Namespace) -> tuple[Any, ...]:
        """Build the dataclasses, in their order. What they refuse with a ValueError is a mistake of the user's."""
        try:
            return self.parse_dict(vars(namespace))
        except ValueError as error:
            fail(" ".join(str(error).split()))


@dataclass
class ModelArguments:
    _argument_group_name = "base model"

    model_path: str = field(
        default="models/tiny-qwen",
        metadata={"help": "folder of a Qwen checkpoint, or its name on the Hugging Face hub"},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "base weights in 4-bit NF4 (about 0.55 bytes a weight; half precision takes 2)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the Python code that a checkpoint brings; only if you trust its author"}
    )


@dataclass
class DataArguments:
    _argument_group_name = "data and output"

    data_path: str = field(
        default="data/train.json",
        metadata={"help": "training rows: a JSON list or JSON Lines with instruction, input, output (or messages)"},
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={
            "help": "rows to evaluate on: the loss every epoch, unless --eval_strategy says otherwise, and the metrics "
            "at the end"
        },
    )
    eval_metrics: bool = field(
        default=True,
        metadata={"help": "answer the rows of eval_data_path after training, and print how good the answers are"},
    )
    max_length: int = field(default=1024, metadata={"help": "longest row, in tokens; longer rows are cut at the end"})
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "chat: the model's own template; plain: Instruction, Input, Output; auto: chat for instruct models "
            "and plain for base models",
            "choices": ["auto", "chat", "plain"],
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the adapter and the checkpoints that --output_dir holds"}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "measure the memory that the longest rows need, and the time of the run; train nothing"},
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "keep the checkpoints of a finished run; each is about three adapters large"}
    )

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"--max_length {self.max_length}: a row needs at least 2 tokens, a prompt and an answer")


def parse_arguments(
    method_arguments: type, description: str | None, argv: list[str] | None = None, **defaults: Any
) -> tuple[ModelArguments, DataArguments, Any, TrainingArguments]:
    """Parse a training script's command line; settle precision and device; check the output folder.

    Args:
        method_arguments: the dataclass of the method's own flags.
        defaults: the method's defaults for fields of TrainingArguments.

    Raises:
        SystemExit: code 2, for a flag or value that can not be used.
    """
    parser = ScriptParser((ModelArguments, DataArguments, method_arguments, TrainingArguments), description)
    parser.set_defaults(
        fp16=True,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter would log a NaN loss as 0.0
        save_steps=200,
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,  # batches are made while the GPU works
        save_total_limit=2,
        ddp_find_unused_parameters=False,  # every trained parameter takes part in every forward
        remove_unused_columns=False,  # the rows' numbers are for the messages of guards.py
        prediction_loss_only=True,  # or an evaluation would gather rows x length x 152k logits
        **defaults,
    )
    flags = parser.parse_flags(argv)
    on_cuda = torch.cuda.is_available() and not flags.use_cpu
    flags.bf16 = flags.bf16 and on_cuda
    flags.fp16 = flags.fp16 and on_cuda and not flags.bf16
    flags.dataloader_pin_memory = flags.dataloader_pin_memory and on_cuda
    if flags.use_liger_kernel and not (on_cuda and find_spec("liger_kernel")):
        fail("--use_liger_kernel needs a GPU and the package liger-kernel: pip install liger-kernel, or leave it out")
    if flags.eval_data_path and flags.eval_strategy == "no":
        flags.eval_strategy = "epoch"
    if flags.load_best_model_at_end:
        if not flags.eval_data_path:
            fail("--load_best_model_at_end needs rows that tell which is the best: add --eval_data_path data/test.json")
        if flags.save_strategy == "steps":
            flags.save_strategy = flags.eval_strategy  # there must be a checkpoint of what was evaluated
    model_args, data_args, method_args, training_args = parser.to_dataclasses(flags)

    reports = training_args.report_to
    for name in [reports] if isinstance(reports, str) else reports:
        if name not in ("none", "all") and not find_spec(name):
            fail(f"--report_to {name} needs the package of that name: pip install {name}, or leave the flag out")
    if training_args.label_smoothing_factor:
        fail("--label_smoothing_factor needs the logits of all tokens, which are not computed here; leave it out")
    if training_args.eval_strategy != "no" and not data_args.eval_data_path:
        fail("--eval_strategy needs rows to evaluate on: add --eval_data_path data/test.json")
    if data_args.overwrite_output_dir and training_args.resume_from_checkpoint:
        fail("--overwrite_output_dir starts anew and --resume_from_checkpoint goes on: leave one of them out")
    told = data_args.overwrite_output_dir or training_args.resume_from_checkpoint or data_args.dry_run
    check_output_dir(training_args.output_dir, told=bool(told))
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1  # or the Trainer would split each batch over all GPUs, in one slow process
        say("several GPUs but one process: only the first GPU is used; for all of them: torchrun --nproc_per_node gpu")
    if not on_cuda:
        say("no GPU: training in float32 (half precision is many times slower on a CPU)")
    elif flags.fp16 and torch.cuda.is_bf16_supported():
        say("training in float16; --bf16 True is safer for Qwen, and this GPU can do it")
    return model_args, data_args, method_args, training_args
