"""The memory on each GPU: arithmetic, compared with figures that were worked out by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, Run

from benchmarking import scaling
from benchmarking.scaling import CONTEXT, GIB, USABLE, Size, largest_that_fits, measure_shape, memory
from benchmarking.shapes import SHAPES

PARAMETERS_7B = 7_615_616_512


def test_weights_of_a_7b() -> None:
    size = measure_shape("qwen2.5-7b")
    norm = 3584  # the last one is in no layer
    assert size.layers * size.layer + 2 * size.vocabulary + norm == PARAMETERS_7B
    assert size.largest == 3584 * 18944
    assert size.lora == 28 * 8 * (3584 + 3584 + 2 * (3584 + 512)) and size.prompt == 20 * 3584
    assert size.weights() == PARAMETERS_7B - norm


def test_vocabulary_that_is_shared_counts_once() -> None:
    size = measure_shape("qwen2.5-0.5b")
    assert size.tied and size.weights() == 494_032_768 - 896  # all but the last norm
    assert memory(size, 0, 0, 1, False, 0)[0] == 2 * size.weights()


SIZE = Size(layers=4, layer=100, matrices=80, largest=30, vocabulary=1000, lora=7)


def test_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LOGITS_MEMORY", 0)
    whole, total = memory(SIZE, kept=3, tokens=10, gpus=1, in_4bit=False, trained=7)
    assert whole == 2 * (4 * 100 + 2 * 1000) and total == whole + 3 * 10 * 4 + 16 * 7
    part, total = memory(SIZE, kept=0, tokens=10, gpus=8, in_4bit=False, trained=0)
    assert part == whole / 8 and total == part + 2 * 200 + 2000  # two layers and lm_head are whole while they work
    shared, _ = memory(SIZE._replace(tied=True), kept=0, tokens=10, gpus=1, in_4bit=False, trained=0)
    assert shared == 2 * (4 * 100 + 1000)
    packed, total = memory(SIZE, kept=0, tokens=10, gpus=1, in_4bit=True, trained=0)
    assert packed == pytest.approx(4 * (80 * 0.5159 + 20 * 2) + 4000, rel=1e-4) and total == packed + 60


def test_7b_as_measured_elsewhere() -> None:
    """The figures of the README: 15.2 GB in 16 bits, about 5.6 GB in 4 bits."""
    size = measure_shape("qwen2.5-7b")
    assert memory(size, 0, 0, 1, False, 0)[0] / 1e9 == pytest.approx(15.2, abs=0.05)
    assert memory(size, 0, 0, 1, True, 0)[0] / 1e9 == pytest.approx(5.6, abs=0.1)
    assert GIB == 2**30


def make_table(*flags: str) -> str:
    """What the command prints, in a process of its own: models that are never filled still take address space."""
    command = [sys.executable, "-m", "benchmarking.scaling", *flags]
    return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout.strip()


@pytest.mark.slow
def test_the_table_is_the_one_in_the_documents() -> None:
    table = make_table()
    assert len(table.splitlines()) == 2 + 4 * 4
    for name in ("scaling.md", "scaling_zh.md"):
        text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        assert f"<!-- memory -->\n\n{table}\n\n<!-- /memory -->" in text


TRAINED = r"[\d,]+ \(0\.\d+%\)"  # parameters of LoRA, QLoRA, prompt tuning


@pytest.mark.slow
def test_the_table_by_card_is_the_one_in_the_readmes() -> None:
    table = make_table("--cards", "8,12,16,24,48,80")
    for name in ("README.md", "README_zh.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert f"<!-- memory -->\n\n{table}\n\n<!-- /memory -->" in text
        methods = text[: text.index("\n## ")]
        assert re.findall(TRAINED, methods) == re.findall(TRAINED, table)[:3]


def test_what_fits_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest model that fits, with all that are smaller; a card is not filled to the brim."""
    needed = {shape: measure_shape(shape).weights() * 2.0 for shape in SHAPES}
    monkeypatch.setattr(scaling, "step_memory", lambda shape, *rest: (0, needed[shape]))
    assert largest_that_fits(16, list(SHAPES), "lora", False, False, 1) == "7B"
    needed["qwen2.5-7b"] = (16 * USABLE - CONTEXT) * GIB
    assert largest_that_fits(16, list(SHAPES), "lora", False, False, 1) == "7B"
    needed["qwen2.5-7b"] += 1
    assert largest_that_fits(16, list(SHAPES), "lora", False, False, 1) == "4B"
    assert largest_that_fits(1, list(SHAPES), "lora", False, False, 1) == "none"


def test_both_languages_have_the_same_sections() -> None:
    texts = [(REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in ("scaling.md", "scaling_zh.md")]
    english, chinese = (re.findall(r"^(?:#+ |- |\| ?|```)", text, re.M) for text in texts)
    assert english == chinese
    assert re.findall(r"```bash\n(.*?)```", texts[0], re.S) == re.findall(r"```bash\n(.*?)```", texts[1], re.S)


def test_mistakes(run_main: Run, tmp_path: Path) -> None:
    assert "choose from" in run_main(scaling, "--shapes", "qwen9", expected=2)
    assert "--cards 8,big" in run_main(scaling, "--cards", "8,big", expected=2)
    assert "<!-- memory -->" in run_main(scaling, "--report", tmp_path / "none.md", expected=2)
