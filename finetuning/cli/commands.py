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
    for flag in ("--overwrite_output_dir", "--resume_from_checkpoint"):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return join([*words, "--resume_from_checkpoint", "True"])


def inference_command(output_dir: str) -> str:
    return f"python {Path(sys.argv[0]).with_name('inference.py')} --adapter_path {output_dir}"
