"""What a run shows while it trains: on a terminal, in a file, and what it says at its end."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from support import REPOSITORY, STEP, Run

import train_lora
import train_prompt_tuning
from finetuning.training import progress
from finetuning.training.checkpoints import CheckpointWriter
from finetuning.training.trainer import FineTuningTrainer


def run_in_terminal(words: list[str], **environment: str) -> str:
    """The screen of a run on a terminal of 80 columns, with its control characters."""
    main, side = pty.openpty()
    command = [sys.executable, "train_lora.py", *words]
    termios.tcsetwinsize(side, (24, 80))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=side, stdout=side, stderr=side, env=os.environ | environment
    )
    os.close(side)
    screen = b""
    while True:
        try:
            screen += os.read(main, 4096)
        except OSError:  # the program has ended
            break
    assert process.wait() == 0, screen.decode()
    return screen.decode()


@pytest.mark.slow
def test_on_a_terminal(flags: list[str], rows_path: str) -> None:
    """A bar that is gone at the end, colours unless NO_COLOR is set, and no line of numbers wider than 80 columns."""
    words = [*flags, "--disable_tqdm", "False", "--logging_steps", "1", "--eval_data_path", rows_path]
    screen = run_in_terminal(words)
    assert "of 6 steps" in screen and "evaluating 1 of 2" in screen and "\033[32m" in screen
    plain = run_in_terminal([*words, "--overwrite_output_dir", "True"], NO_COLOR="1")
    assert "of 6 steps" in plain and not re.search(r"\033\[\d+m", plain)
    assert len(STEP.findall(plain.replace("\r", "\n"))) == 6
    kept = [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]
    assert not any("of 6 steps" in line for line in kept)
    assert max(len(line) for line in kept if STEP.match(line) or "tokens/s" in line or "evaluation" in line) <= 80


@pytest.mark.slow
def test_in_a_file(flags: list[str], rows_path: str, tmp_path: Path) -> None:
    """No bars, no carriage returns, no colours; and no warning if Jupyter's variables are set, as after `!`."""
    command = [sys.executable, "train_lora.py", *flags, "--disable_tqdm", "False", "--eval_data_path", rows_path]
    jupyter = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with (tmp_path / "log.txt").open("wb") as log:
        subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=True, env=jupyter)
    text = (tmp_path / "log.txt").read_bytes().decode()
    assert "\r" not in text and "\033" not in text and "it/s" not in text and "warning" not in text
    assert len(STEP.findall(text)) == 2 and text.count("  evaluation, ") == 2


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_answers_before_and_after(
    run_main: Run, flags: list[str], rows_path: str, script: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the evaluation, with the answers of the base model alone and of the adapter, and the right one."""
    learn = ["--max_steps", 60, "--learning_rate", 0.05, "--eval_data_path", rows_path, "--eval_metrics", False]
    printed = run_main(script, *flags, *learn)
    shown = re.findall(r"^row (\d+) +(.*)\n  right +(.*)\n  base +(.*)\n  adapter +(.*)\n", printed, re.MULTILINE)
    assert [number for number, *_ in shown] == ["1", "5", "9"]
    assert shown[0][1:3] == ("'Instruction: Say sun'", "'sun'")
    assert all(base != right for _, _, right, base, _ in shown)
    assert any(adapter != base for *_, base, adapter in shown)
    first, last = re.search(r"^loss: ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE).groups()
    assert float(last) < float(first)
    none = run_main(script, *flags, "--overwrite_output_dir", True, "--sample_answers", 0)
    assert "\n  adapter" not in none and "\nrow " not in none


def test_a_resumed_run_says_where_it_begins(run_main: Run, flags: list[str], trained: Callable[..., Path]) -> None:
    checkpoint = trained(train_lora, "--save_steps", 2, "--keep_checkpoints", True) / "checkpoint-4"
    printed = run_main(train_lora, *flags, "--resume_from_checkpoint", checkpoint)
    assert "steps       6 from step 4, of 4 rows" in printed and len(STEP.findall(printed)) <= 2


def test_the_speed_is_that_of_the_steps(
    run_main: Run, flags: list[str], rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second; what comes before the first, each evaluation and each checkpoint take a thousand."""
    clock = [0.0]

    def slow(name: str, seconds: float) -> None:
        original = getattr(FineTuningTrainer, name)

        def wait(self: FineTuningTrainer, *args: object, **kwargs: object) -> object:
            clock[0] += seconds
            return original(self, *args, **kwargs)

        monkeypatch.setattr(FineTuningTrainer, name, wait)

    slow("training_step", 1)
    slow("evaluate", 1000)
    slow("train", 1000)
    on_save = CheckpointWriter.on_save
    monkeypatch.setattr(
        CheckpointWriter,
        "on_save",
        lambda *args, **kwargs: clock.append(clock.pop() + 1000) or on_save(*args, **kwargs),
    )
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    words = ["--eval_data_path", rows_path, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 3]
    run_main(train_lora, *flags, *words, "--sample_answers", 0, "--eval_metrics", False)
    speed = json.loads((tmp_path / "out/training_report.json").read_text(encoding="utf-8"))["speed"]
    assert speed["step_seconds"] == 6 and clock[0] > 5000
