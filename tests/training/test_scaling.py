"""The memory on each GPU: arithmetic, compared with figures that were worked out by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, Run

from benchmarking import scaling
from benchmarking.scaling import CONTEXT, GIB, USABLE, count_weights, kept_bytes, largest_that_fits
from benchmarking.shapes import SHAPES
from finetuning.training import attention
from finetuning.training.memory import Need, compute_step

pytestmark = pytest.mark.skipif(
    not attention.varlen_attn or "enable_gqa" not in attention.signature(attention.varlen_attn).parameters,
    reason="before PyTorch 2.12 keys and values are repeated, and kept: 12 KiB more for a token and layer of a 7B",
)


def test_weights_of_a_7b() -> None:
    """The figures of the README: 15.2 GB in 16 bits, about 5.6 GB in 4 bits."""
    size, lora = count_weights("qwen2.5-7b", "lora")
    norm = 3584  # the last one is in no layer
    assert size.weights() + norm == 7_615_616_512 and size.largest == 3584 * 18944
    assert lora == 28 * 8 * (3584 + 3584 + 2 * (3584 + 512))
    assert count_weights("qwen2.5-7b", "prompt_tuning") == (size, 20 * 3584)
    assert compute_step(size, 0, 0, 0).weights / 1e9 == pytest.approx(15.2, abs=0.05)
    assert compute_step(size, 0, 0, 0, in_4bit=True).weights / 1e9 == pytest.approx(5.6, abs=0.1)


def test_vocabulary_that_is_shared_counts_once() -> None:
    size, _ = count_weights("qwen2.5-0.5b", "lora")
    assert size.tied and size.weights() == 494_032_768 - 896  # all but the last norm
    assert compute_step(size, 0, 0, 0).weights == 2 * size.weights()


def test_what_a_token_keeps(run_main: Run) -> None:
    printed = run_main(scaling, "--kept", True, "--shapes", "qwen2.5-7b")
    assert "LoRA on q, k, v         186.7, with checkpointing   7.0" in printed
    assert "LoRA, --lora_dropout 0  162.2, with checkpointing   7.0" in printed
    assert "prompt tuning           155.1, with checkpointing   7.0" in printed


def test_the_cast_of_peft_keeps_nothing() -> None:
    """Autocast undoes it at once: it costs time, and memory for a moment."""
    assert kept_bytes("qwen2.5-7b", "lora", cast_inputs=True) <= 190 * 1024


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
    """The largest model that fits, with all that are smaller; 5% of a card stay free."""
    needed = {shape: count_weights(shape, "lora")[0].weights() * 2.0 for shape in SHAPES}
    monkeypatch.setattr(scaling, "step_memory", lambda shape, *rest: Need(needed[shape], 0, 0, 0))
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
