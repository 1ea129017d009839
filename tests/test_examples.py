"""The commands of examples/README.md, run one after the other, and what it shows of their output."""

import importlib
import json
import re
import shlex
from io import StringIO
from pathlib import Path

import pytest
from support import REPOSITORY

PAGES = ["README.md", "README_zh.md"]
EXAMPLES = ["classification", "translation", "generation", "chat", "thoughts"]
MARGIN = 15  # points of a score: other processors round in another way


def page(name: str) -> str:
    return (REPOSITORY / "examples" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with links to the repository, in which the commands write their outputs."""
    for name in ("examples", "models"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetuning.cli.arguments.REPOSITORY", tmp_path)
    return tmp_path


def score_line(line: str) -> list[str] | None:
    """The cells of a line of scores: task, rows, exact match, macro-F1, BLEU, chrF."""
    cells = [cell.strip(" %") for cell in line.strip("|").split("|")]
    return cells if line.startswith("|") and len(cells) == 6 else None


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_comes_out(
    name: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command runs; the answers are those of the page, and the scores at least those, less a margin."""
    place = next(number for number, text in enumerate(blocks(page("README.md"), "bash")) if f"outputs/{name} " in text)
    commands = blocks(page("README.md"), "bash")[place].replace("\\\n", "").splitlines()
    shown = blocks(page("README.md"), "text")[place - 1].splitlines()  # the first block of commands is for a real Qwen
    assert len(commands) >= 3 and len(shown) >= 2
    for command in commands:
        typed, _, command = command.rpartition(" | ") if command.startswith("printf") else ("", "", command)
        monkeypatch.setattr("sys.stdin", StringIO(typed.partition("'")[2].strip("'").replace("\\n", "\n")))
        _, script, *flags = shlex.split(command)
        monkeypatch.setattr("sys.argv", [script, *flags, *(["--disable_tqdm", "True"] if "train" in script else [])])
        importlib.import_module(Path(script).stem).main()
    captured = capsys.readouterr()
    printed = (captured.out + captured.err).splitlines()
    for line in shown:
        if cells := score_line(line):
            found = next(other for other in map(score_line, printed) if other and other[:2] == cells[:2])
            for claimed, measured in zip(cells[2:], found[2:], strict=True):
                assert bool(claimed) == bool(measured)
                assert not claimed or float(measured) >= float(claimed) - MARGIN, (line, found)
        elif "\t" in line:  # a label and its probability
            label, claimed = line.split("\t")
            assert any(re.match(rf"{label}\t0\.", other) for other in printed), printed
            measured = next(other.split("\t")[1] for other in printed if other.startswith(f"{label}\t"))
            assert abs(float(measured) - float(claimed)) <= MARGIN / 100
        else:
            assert line in printed, printed


@pytest.mark.parametrize("name", EXAMPLES)
def test_files(name: str) -> None:
    """As many rows as the page says; the row it shows is the first; no held-out row is a training row."""
    train, test = (
        json.loads((REPOSITORY / f"examples/{file}.json").read_text(encoding="utf-8"))
        for file in (name, f"{name}_test")
    )
    assert 30 <= len(train) <= 60 and len(test) >= 10
    assert re.search(rf"^\| \[{name}\]\(.*\) \| {len(train)} \| {len(test)} \|", page("README.md"), flags=re.M)
    assert json.loads(blocks(page("README.md"), "json")[EXAMPLES.index(name)]) == train[0]
    questions = [json.dumps(row.get("messages") or row["input"], ensure_ascii=False) for row in train + test]
    assert len(set(questions)) == len(questions)


def test_pages_are_in_step() -> None:
    """Same commands, rows, output and figures, and as many headings."""
    for language in ("bash", "json", "text"):
        assert blocks(page("README.md"), language) == blocks(page("README_zh.md"), language)
    for pattern in (r"\b\d+\.\d+\b", r"^#+ ", r"^\| \[.*\| (\d+) \| (\d+) \|"):
        found = [re.findall(pattern, page(name), flags=re.M) for name in PAGES]
        assert found[0] == found[1]
    for name in PAGES:
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall("^## (.*)", page(name), re.M)
        }
        assert set(re.findall(r"\]\(#(.*?)\)", page(name))) <= anchors
        for target in re.findall(r"\]\(([\w./-]+)\)", page(name)):
            assert (REPOSITORY / "examples" / target).exists(), target
