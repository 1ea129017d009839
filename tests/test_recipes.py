"""benchmarking/recipes.py: each run once, a table as they come, and what failed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support import REPOSITORY, Run

from benchmarking import recipes


class Trainings:
    """Stands for the processes: each writes a report with the next score, or fails."""

    def __init__(self, scores: list[float | None]) -> None:
        self.scores, self.commands = scores, []

    def __call__(self, command: list[str], **options: Any) -> Mock:
        self.commands.append(command[1:])
        score = self.scores[len(self.commands) - 1]
        if score is None:
            return Mock(returncode=2, stderr="error: no memory\n")
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        scores = {"scores": {"a": {"exact_match": 0.0}, "all": {"exact_match": score}}}
        if "--output_file" in flags:
            file, content = Path(flags["--output_file"]).with_suffix(".metrics.json"), scores
        else:
            file = Path(flags["--output_dir"], "training_report.json")
            content = {"metrics": scores, "trainable_parameters": 1000}
            content["speed"] = {"seconds": 60.0, "peak_memory_gib": 1.5}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        return Mock(returncode=0)


def test_table(run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- recipes -->\n<!-- /recipes -->\n")
    trainings = Trainings([50.0, 80.0, 70.0, 90.0, None])
    monkeypatch.setattr(subprocess, "run", trainings)
    flags = ["--recipes", "base,contract,soft-20", "--seeds", 2, "--output_dir", tmp_path, "--report", page]
    printed = run_main(recipes, *flags, "--flags", "--max_steps 5")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"][2:]
    assert cells[0] == ["base", "50.0", "1", "", "", ""] and cells[2][:3] == ["soft-20", "70.0", "1"]
    assert cells[1] == ["contract", "85.0 ± 7.1", "2", "1,000", "60", "1.50"]
    assert "85.0 ± 7.1" in page.read_text() and (tmp_path / "recipes.png").is_file()
    saved = json.loads((tmp_path / "recipes.json").read_text())["results"]
    assert [run["score"] for run in saved["contract"]] == [80.0, 90.0]
    assert ["--seed", "2"] in [command[i : i + 2] for command in trainings.commands for i in range(len(command))]
    assert all(command[-2:] == ["--max_steps", "5"] for command in trainings.commands[1:])
    # again: only what has failed
    trainings.scores.append(60.0)
    run_main(recipes, *flags)
    assert len(trainings.commands) == 6 and "--num_virtual_tokens" in trainings.commands[-1]


def test_mistakes(run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "choose from base, contract" in run_main(recipes, "--recipes", "best", expected=2)
    assert "--seeds" in run_main(recipes, "--seeds", 0, expected=2)
    monkeypatch.setattr(subprocess, "run", Trainings([1.0]))
    flags = ["--recipes", "contract", "--seeds", 1, "--output_dir", tmp_path]
    assert "no run has given a score" in run_main(recipes, *flags, "--score", "chrf", expected=1)


@pytest.mark.slow
def test_in_earnest(tmp_path: Path) -> None:
    flags = "--recipes base,contract,soft-5 --seeds 1 --score exact_match --flags".split()
    command = [sys.executable, "-m", "benchmarking.recipes", *flags, "--max_steps 2 --max_rows 20"]
    rows = json.loads((REPOSITORY / "data/test.json").read_text(encoding="utf-8"))[:8]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    command += ["--output_dir", str(tmp_path), "--eval_data_path", str(tmp_path / "few.json")]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0 and "| soft-5" in result.stdout, result.stderr
