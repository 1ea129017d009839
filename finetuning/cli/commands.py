"""Command lines: the one that runs, and those that a run ends with."""

import os
import re
import shlex
import sys
from pathlib import Path

import psutil


def command_line() -> str:
    """The command line as it may be published."""
    return join(["python", *sys.argv])


def join(words: list[str]) -> str:
    """The words as a command line, without the token of `--hub_token`."""
    return re.sub(r"(--hub[_-]token)[ =]\S+", r"\1 ...", shlex.join(words))


def resume_command() -> str:
    """The command line that resumes this run from its last checkpoint, with its launcher if it has one."""
    words = ["python", *sys.argv]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = psutil.Process().parent().cmdline()  # python -m ..., or python path/to/torchrun ...
        words = ["python", *launcher[1:]] if launcher[1] == "-m" else [Path(launcher[1]).name, *launcher[2:]]
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):  # a flag, with its value if there is a "="; else its values are the words after it
            name = word.partition("=")[0].replace("-", "_")
            keep = name not in ("__overwrite_output_dir", "__resume_from_checkpoint")
        if keep:
            kept.append(word)
    return join([*kept, "--resume_from_checkpoint", "True"])


def inference_command(output_dir: str) -> str:
    return f"python {Path(sys.argv[0]).with_name('inference.py')} --adapter_path {output_dir}"
