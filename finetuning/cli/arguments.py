"""The command line: a parser that answers each mistake with one line, and the flags every script has."""

import math
import os
import shlex
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from finetuning.cli.console import end_quietly_on_interrupt, fail, first_line, print_any_text
from finetuning.cli.memory import allow_expandable_segments

REPOSITORY = Path(__file__).resolve().parents[2]

# The last words of flags that must be more than 0; other numbers may be 0.
COUNTS = ("epochs", "factor", "layers", "length", "rate", "rows", "size", "steps", "tokens")
PER_PROCESSOR = 16  # workers, at most
TRUST = "run the Python code that comes with a checkpoint; only if you trust its author"
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
    "use_mps_device": "nothing: the device is found automatically",
    "warmup_ratio": "--warmup_steps: a number below 1 is a share of the run",
}


def beside_scripts(path: str) -> str:
    """A default path inside the repository, as seen from the current folder: the scripts run from any folder."""
    found = REPOSITORY / path
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)


def flag(default: Any, help: str, choices: list[str] | None = None) -> Any:
    """A dataclass field that is a flag of the command line."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and a docstring as it was written."""


class ScriptParser(HfArgumentParser):
    """An argument parser fed by dataclasses. A wrong command line gets one line on stderr and exit code 2.

    A dataclass names its group in the help with `_argument_group_name`, which HfArgumentParser reads.
    """

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
        """Read the command line (None for `sys.argv`) and refuse flags that do not exist."""
        end_quietly_on_interrupt()
        print_any_text()
        allow_expandable_segments()
        os.environ.pop("MPLBACKEND", None)  # pictures need none; Jupyter's own is missing in other environments
        if not sys.stderr.isatty():
            disable_progress_bar()  # of transformers: a log file needs none
        warnings.filterwarnings("ignore", category=FutureWarning)  # deprecation notices not meant for users
        namespace, unknown = self.parse_known_args(argv)
        for word in unknown:
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            if not word.startswith("--"):
                fail(f"'{word}' belongs to no flag; put a value with spaces in quotes")
            if name in OTHER_NAMES:
                fail(f"{word}: no such flag here; use {OTHER_NAMES[name]}")
            near = get_close_matches(name, vars(namespace), n=1)
            fail(f"{word}: no such flag" + (f"; did you mean --{near[0]}?" if near else " (--help lists the flags)"))
        self.given = {name: value for name, value in vars(namespace).items() if value != self.get_default(name)}
        for name, value in self.given.items():  # a default, such as --max_steps -1, has a meaning of its own
            if value == "":
                fail(f"--{name} is empty: give a value, or leave the flag out")
            least = "more than 0" if name.split("_")[-1] in COUNTS else "at least 0"
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and least == "at least 0"):
                fail(f"--{name} {value}: must be a finite number, {least}")
            if name.endswith("workers") and value > (most := PER_PROCESSOR * (os.cpu_count() or 1)):
                fail(f"--{name} {value}: must be at most {most} on this machine; more would only wait for each other")
        return namespace

    def to_dataclasses(self, namespace: Namespace, attempt: Callable[[tuple[Any, ...]], Any] = tuple) -> Any:
        """Build the dataclasses, in their order; returns them, or what an attempt makes of them.

        An error that some flags make is a mistake of the user's: the message names those without which there is none.
        """

        def refusal(**changes: Any) -> str:
            try:
                attempt(self.parse_dict(vars(namespace) | changes))
            except Exception as error:
                return first_line(error)
            return ""

        try:
            return attempt(self.parse_dict(vars(namespace)))
        except Exception as error:
            message = first_line(error)
            if message.startswith("--"):
                fail(message)
            without = {name: refusal(**{name: self.get_default(name)}) for name in self.given}
            names = [name for name in without if not without[name]] or [n for n in without if without[n] != message]
            if not names:
                raise
        words = [f"--{name} {shlex.quote(str(self.given[name]))}" for name in names]
        fail(f"{' '.join(words)}: {message} (--help lists the flags)")

    def parse(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses of a command line; exits with code 2 for a flag or value that cannot be used."""
        return self.to_dataclasses(self.parse_flags(argv))


@dataclass
class ModelArguments:
    _argument_group_name = "base model"

    model_path: str = flag(
        beside_scripts("models/tiny-qwen"), "folder of a Qwen checkpoint, or its name on the Hugging Face hub"
    )
    load_in_4bit: bool = flag(False, "base weights in 4-bit NF4 (about 0.55 bytes a weight; half precision takes 2)")
    trust_remote_code: bool = flag(False, TRUST)
