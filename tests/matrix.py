"""Print what works: each architecture and method, through all that is done with an adapter.

    python tests/matrix.py        # a Markdown table, in five minutes

The cells are those of test_matrix.py. Models are tiny, and have random weights.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from golden import FULL, LINEAR, MODULES
from support import call_main, difference, save_base

import inference
import merge_adapter
import train_lora
import train_prompt_tuning
from finetuning.merging import verification

# What the table calls the kinds of `save_base`. Of a class with vision, the text part is trained.
KINDS = {name: name for name in MODULES} | {"whole": "qwen3_5, with vision", "wholeMoe": "qwen3_5_moe, with vision"}
METHODS = ["LoRA", "4-bit LoRA", "prompt tuning"]
WORDS = ["sun", "rain", "wind", "snow", "fog", "hail"]
ROWS = [{"instruction": "Say " + f"{word} " * (1 + n % 3), "output": word} for n, word in enumerate(WORDS)]
RUN = "--max_steps 4 --save_steps 2 --keep_checkpoints True --per_device_train_batch_size 2 --sample_answers 0"
RUN += " --disable_tqdm True"


class Refused(Exception):
    """The line with which a script ended."""


def call(script: ModuleType, *flags: object) -> str:
    """Run a script; returns what it printed.

    Raises:
        Refused: it ended with code 2.
    """
    code, printed = call_main(script, list(flags))
    assert "Traceback" not in printed and code in (0, 2), printed
    if code == 2:
        raise Refused(printed[printed.index("error: ") :].removeprefix("error: ").strip().replace("\n", " "))
    return printed


def answers(name: str, of: Path, rows: Path, *flags: object) -> list[dict[str, Any]]:
    """The rows as inference.py answers them; `name` is the flag for `of`, an adapter or a model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answers.jsonl")
        words = [name, of, "--data_path", rows, "--output_file", file, "--max_new_tokens", 8]
        call(inference, *words, *flags)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def try_cell(kind: str, method: str, folder: Path) -> dict[str, str]:
    """For each action "yes", or the line with which it was refused.

    Raises:
        AssertionError: an action did something else.
    """
    four_bit = method == "4-bit LoRA"
    wide = {"hidden_size": 64, "head_dim": 16} if four_bit else {}  # as bitsandbytes wants it
    base, rows = save_base(folder / "base", kind, **wide), folder / "rows.json"
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    adapter, again, merged = folder / "adapter", folder / "again", folder / "merged"
    script, flags = train_prompt_tuning, ["--learning_rate", 0.3]
    if method != "prompt tuning":
        script, modules = train_lora, MODULES.get(kind, f"{FULL},{LINEAR}")
        flags = ["--learning_rate", 0.01, "--target_modules", modules, "--load_in_4bit", four_bit]
    flags += [*RUN.split(), "--model_path", base, "--data_path", rows, "--output_dir"]

    def train() -> None:
        call(script, *flags, adapter)
        info = json.loads((adapter / "adapter_info.json").read_text(encoding="utf-8"))
        assert info["quantization"] == ("nf4" if four_bit else None)

    def resume() -> None:
        assert "from step 2" in call(script, *flags, again, "--resume_from_checkpoint", adapter / "checkpoint-2")
        assert difference(adapter, again) == 0.0

    def batches() -> None:
        one, all_ = (answers("--adapter_path", adapter, rows, "--batch_size", size) for size in (1, len(ROWS)))
        assert one == all_ and len({row["prediction"] for row in one}) > 1

    def labels() -> None:
        chosen = answers("--adapter_path", adapter, rows, "--labels", ",".join(WORDS))
        for row in chosen:
            assert row["prediction"] in WORDS and abs(sum(row["probabilities"].values()) - 1) < 1e-4

    def merge() -> None:
        with patch.object(verification, "MAX_NEW_TOKENS", 8):
            call(merge_adapter, "--adapter_path", adapter, "--output_dir", merged, "--check_data_path", rows)
        if not four_bit:  # merged into the weights before they were quantised
            assert answers("--model_path", merged, rows) == answers("--adapter_path", adapter, rows)

    actions: dict[str, Callable[[], object]] = {
        "train": train,
        "resume, difference 0.0": resume,
        "batch = single": batches,
        "labels": labels,
        "merge": merge,
    }
    outcomes = {}
    for name, action in actions.items():
        try:
            action()
            outcomes[name] = "yes"
        except Refused as reason:
            outcomes[name] = str(reason)
    return outcomes


def make_table(cells: dict[tuple[str, str], dict[str, str]]) -> str:
    """A Markdown table of outcomes; the cells are of a kind and a method."""
    rows = [["architecture", "method", *next(iter(cells.values()))]]
    rows += [[KINDS[kind], method, *outcomes.values()] for (kind, method), outcomes in cells.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    torch.set_num_threads(1)
    cells = {}
    for cell in product(KINDS, METHODS):
        with tempfile.TemporaryDirectory() as folder:
            cells[cell] = try_cell(*cell, Path(folder))
    print(make_table(cells))


if __name__ == "__main__":
    main()
