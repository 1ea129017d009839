"""What the scripts say: lines on stdout, warnings on stderr, and one message if a run cannot continue."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOBase, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

# On some processors bitsandbytes warns, when peft imports it, that it lacks a faster kernel. That does no harm.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

PATIENCE = 10  # seconds that the other processes leave the main one to say why a run ends


def is_main_process() -> bool:
    """Whether this process speaks for all of them; torchrun and accelerate number the processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line, only once if several processes train together."""
    if is_main_process():
        tqdm.write(text, sys.stdout)  # above the progress bar, if there is one
        sys.stdout.flush()


def fact(name: str, text: str) -> None:
    """Print a line of the table that a run begins with."""
    say(f"{dim(f'{name:11}')} {text}")


def paint(text: str, code: int) -> str:
    """The text in an ANSI colour, on a terminal that shows colours (https://no-color.org)."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


dim, green, cyan = (partial(paint, code=code) for code in (2, 32, 36))


def describe_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress_bar(text: str, unit: str, total: int | None = None, done: int = 0, disable: bool = False) -> tqdm:
    """A progress bar on a terminal, which begins at `done`; elsewhere, such as in a log file, a line every minute."""
    layout: dict[str, Any] = {"leave": False, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        rest = " of {total_fmt} {unit}, {elapsed} so far, {remaining} left" if total else " {unit}, {elapsed} so far"
        layout = {"file": Lines(), "bar_format": "{desc}: {n_fmt}" + rest, "mininterval": 60, "delay": 60}
    return tqdm(desc=text, unit=unit, total=total, initial=done, disable=disable, **layout)


class Lines(TextIOBase):
    """Where a bar is drawn that is no bar: each drawing is a line on stderr."""

    def write(self, text: str) -> int:
        if text.strip():
            print(text.strip(), file=sys.stderr)
        return len(text)


def warn(message: str) -> None:
    if is_main_process():
        tqdm.write(f"warning: {message}", sys.stderr)


@contextmanager
def attempt(name: str) -> Iterator[None]:
    """Write a file inside the context. All else is saved: no trouble with it may end the run."""
    try:
        yield
    except Exception as error:
        warn(f"{name} could not be written; all else is saved: {type(error).__name__}: {error}")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print what is wrong and the remedy, and exit. No traceback: those are for bugs of ours.

    Of several processes only the main one speaks, because torchrun ends the others when it exits. A process that
    fails alone speaks after a while. Code 2 is for a mistake of the user's, 1 for a run that went wrong.
    """
    if not is_main_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
        message = f"process {os.environ['RANK']}: {message}"
    announce(message)
    raise SystemExit(code)


def announce(message: str) -> None:
    """Print why the run ends; also in torchrun's table of failed processes, which comes last on the screen."""
    tqdm.write(f"error: {message}", sys.stderr)
    sys.stderr.flush()
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # as in the documentation of torch.distributed.elastic
        details = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "extraInfo": details}}
        Path(file).write_text(json.dumps(report), encoding="utf-8")


def print_any_text() -> None:
    """Let a terminal or a pipe that is not UTF-8 show what it lacks as an escape: a message never ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end the program without a traceback. During training, `StopOnSignal` handles it instead."""
    others = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr, flush=True)
            os._exit(130)
        else:
            others(kind, *rest)

    sys.excepthook = hook


def is_disk_error(error: Exception) -> bool:
    """Whether a write failed. torch and safetensors report a full disk in their own words."""
    words = ("PytorchStreamWriter", "unexpected pos", "No space left", "File too large", "I/O error")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


def first_line(error: Exception) -> str:
    """The first line of an error's message; the error's kind if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
