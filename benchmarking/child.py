"""A measurement in a process of its own: its result, or why there is none."""

import json
import signal
import subprocess
import sys
from typing import Any


def run_child(words: list[str]) -> dict[str, Any] | str:
    """Run a Python script; returns the JSON of its last line on stdout or, if it fails, the reason in one line."""
    child = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8", check=False)
    if child.returncode == 0:
        return json.loads(child.stdout.strip().splitlines()[-1])
    return find_reason(child.returncode, child.stderr)


def find_reason(returncode: int, stderr: str) -> str:
    """Why a process ended: a signal, its message, or the exception below its last traceback; not a progress bar."""
    if returncode < 0:
        what = "; the system kills what takes too much memory" if returncode == -signal.SIGKILL else ""
        return f"killed by signal {-returncode} ({signal.Signals(-returncode).name}{what})"
    lines = stderr.splitlines()
    messages = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if messages:
        return messages[-1]
    tracebacks = [place for place, line in enumerate(lines) if line.startswith("Traceback ")]
    exceptions = [line for line in lines[tracebacks[-1] + 1 :] if line[:1].strip()] if tracebacks else []
    return exceptions[0] if exceptions else f"it ended with exit code {returncode}"
