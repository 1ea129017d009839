"""The flags are tried before anything is loaded: whatever a library refuses is one line, with the flags involved."""

import json
import logging
import random
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin
from unittest.mock import Mock

import pytest
import torch
from support import Run
from transformers import Trainer, TrainingArguments

import train_lora
from finetuning.training.flags import Arguments, parse_arguments

# By type, what no flag means; a flag may have a use for some of them.
WRONG = {
    int: ["0", "-1", "-7", "2.5", "nonsense"],
    float: ["0", "-1", "nan", "inf", "1e400", "nonsense"],
    str: ["", "nonsense", "{", "a=b"],
    dict: ['{"nonsense": 1}', '{"nonsense"', "nonsense", "[]"],
    bool: ["nonsense", "2"],
    list: ["nonsense", ""],
}
OURS = {"output_dir", "local_rank", "max_steps"}  # of the test, and of torchrun


def kinds(annotation: object) -> list[type]:
    """The types that a flag takes."""
    parts = [annotation, get_origin(annotation), *get_args(annotation)]
    return [kind for kind in WRONG if kind in parts]


VALUES = [
    (field.name, value)
    for field in fields(TrainingArguments)
    for kind in kinds(field.type)
    for value in WRONG[kind]
    if field.init and field.name not in OURS
]


def parse(*words: object) -> Arguments:
    return parse_arguments(train_lora.LoraArguments, None, ["--output_dir", "out", *map(str, words)])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message about some flags, or "" if they are accepted."""
    capsys.readouterr()
    try:
        parse(*words)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.startswith("error: ") and len(message.splitlines()) <= 2, message
        return message
    assert capsys.readouterr().err == ""
    return ""


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`parse_arguments` sets a variable of the environment: it goes again after the test."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")


CASES = {
    "--lr_scheduler_type warmup_stable_decay": "num_decay_steps",
    '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"powr":2}': "'powr'",
    "--optim galore_adamw --warmup_steps 3": "galore_torch",
    "--optim_args foo --seed 5": "--optim_args foo: ",
    "--gradient_accumulation_steps 0": "more than 0",
    "--learning_rate -1": "more than 0",
    "--seed -1": "at least 0",
    "--num_train_epochs nan": "finite",
    '--accelerator_config {"n":1}': "'n'",
    "--dataloader_persistent_workers True": "workers",
    "--dataloader_num_workers 99999": "at most",
    "--remove_unused_columns True": "leave it out",
    '--accelerator_config {"dispatch_batches":true}': "neither dispatched nor split",
    "--greater_is_better True --metric_for_best_model eval_loss": "the worst loss",
    "--dataloader_prefetch_factor 0 --dataloader_num_workers 1": "more than 0",
    "--do_train False": "nothing would be trained",
    "--save_strategy best": "--eval_data_path",
    "--metric_for_best_model f1 --eval_split 0.5 --load_best_model_at_end True": "eval_loss",
}
INNOCENT = ["--warmup_steps", "--seed 5", "--lr_scheduler_type polynomial", "--eval_split"]


@pytest.mark.parametrize("words", CASES)
def test_refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    """Trap 99: each names the flags involved, and no others."""
    message = refusal(capsys, *words.split())
    assert CASES[words] in message and words.split()[0] in message.replace("kwargs", words.split()[0])
    assert not any(word in message for word in INNOCENT)


def test_nothing_is_left(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    count = {"gradient_accumulation_kwargs": {"num_steps": 4}}  # the Trainer changes it in place
    args = parse("--accelerator_config", json.dumps(count), "--eval_split", 0.5, "--save_strategy", "best")
    assert args.training.accelerator_config.gradient_accumulation_kwargs == {"num_steps": 4}
    assert args.training.metric_for_best_model == "loss" and args.training.max_steps == -1
    assert list(tmp_path.iterdir()) == [] and logging.root.manager.disable == logging.NOTSET
    assert "{'" not in "".join(capsys.readouterr())


def test_no_whole_batch(run_main: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 99: known when the rows are, before the model is loaded."""
    monkeypatch.setattr(train_lora, "load_model", None)
    words = ["--dataloader_drop_last", True, "--per_device_train_batch_size", 16]
    assert "12 rows are less than a batch of 16" in run_main(train_lora, *flags, *words, expected=2)


def test_wrong_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 99: of fifty flags, none with a traceback."""
    messages = [refusal(capsys, f"--{name}", value) for name, value in random.Random(1).sample(VALUES, 50)]
    assert len(list(filter(None, messages))) > 10


def test_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is full is no wrong flag: loading the model says what to do."""
    monkeypatch.setattr(Trainer, "train", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    parse()
    monkeypatch.setattr(Trainer, "train", Mock(side_effect=RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):  # no flag is to blame: it keeps its traceback
        parse()


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in VALUES))
def test_what_is_accepted_trains(
    capsys: pytest.CaptureFixture[str], run_main: Run, flags: list[str], rows_path: str, name: str
) -> None:
    """Trap 99: nothing is refused after loading; a run may still end because a loss is not finite, with code 1."""
    for value in [value for other, value in VALUES if other == name]:
        words = [f"--{name}", value, "--eval_data_path", rows_path]
        if not refusal(capsys, *words):
            try:
                run_main(train_lora, *flags, *words, "--max_steps", 2, "--overwrite_output_dir", True)
            except SystemExit as stop:
                assert stop.code == 1 or "trainable" not in capsys.readouterr().out
