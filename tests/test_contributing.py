"""CONTRIBUTING.md's worked example: the script that it shows trains an adapter, and inference.py answers with it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
(COMMANDS,) = re.findall(r"```bash\n(python train_dora.py.*?)```", PAGE, flags=re.S)


def test_example_has_our_style() -> None:
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--stdin-filename", "train_dora.py", "-"]
        result = subprocess.run(
            command, cwd=REPOSITORY, input=SCRIPT, capture_output=True, encoding="utf-8", check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_worked_example(tmp_path: Path) -> None:
    """Both commands as they stand, in a folder that holds the new script beside links to the others."""
    (tmp_path / "train_dora.py").write_text(SCRIPT, encoding="utf-8")
    for path in REPOSITORY.iterdir():
        if path.suffix == ".py" or path.name in ("finetuning", "benchmarking", "data", "models"):
            (tmp_path / path.name).symlink_to(path)
    for line in COMMANDS.splitlines():
        command = [sys.executable, *shlex.split(line)[1:]]
        options = {"cwd": tmp_path, "env": os.environ | {"PYTHONUTF8": "1"}, "encoding": "utf-8"}
        result = subprocess.run(command, capture_output=True, check=False, **options)
        assert result.returncode == 0, result.stderr
    answer = re.search(r"The answer is `(.*?)`", PAGE)[1]
    assert result.stdout.splitlines()[-1] == answer == "Good morning"
