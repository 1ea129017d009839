"""console.py: what stands in a log file and in one line, and how Ctrl-C ends a program."""

import re
import sys

import pytest

from finetuning.cli import console


@pytest.mark.parametrize("total", [500, None])
def test_lines_of_a_progress_bar(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are read as they come have no known number, and no time that is left."""
    lines: list[str] = []
    monkeypatch.setattr(console.Lines, "write", lambda self, text: lines.append(text))
    with console.progress_bar("reading", "rows", total) as bar:
        bar.update(200)
        bar.refresh()
    pattern = r"reading: 200 of 500 rows, 00:00 so far, 00:00 left" if total else r"reading: 200 rows, 00:00 so far"
    assert any(re.fullmatch(pattern, line.strip()) for line in lines), lines


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\none\ntwo\n"), "one"), (OSError(), "OSError"), (RuntimeError(" \n"), "RuntimeError")],
)
def test_first_line_of_an_error(error: Exception, line: str) -> None:
    """An error without a message is named."""
    assert console.first_line(error) == line


def test_an_interrupt_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 41: one word and the shell's exit code; every other exception is shown as usual."""
    codes: list[int] = []
    monkeypatch.setattr(console.os, "_exit", codes.append)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    console.end_quietly_on_interrupt()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert codes == [130] and capsys.readouterr().err == "stopped\n"
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert codes == [130] and capsys.readouterr().err == "ValueError: a bug\n"
