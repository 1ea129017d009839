"""What the scripts say: lines on stdout, warnings on stderr, and the end of a run that can not go on."""

import os
import sys
from typing import NoReturn


def say(text: str) -> None:
    """Print a line, once where several processes train together."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message`, which names what is wrong and the remedy, and exit. No traceback: that is for bugs of ours.

    Args:
        message: names the file, row, field or flag.
        code: 2 for a mistake of the user's; 1 for a run that went wrong, such as a loss that is not a number.
    """
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
