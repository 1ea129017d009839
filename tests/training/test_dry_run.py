"""dry_run.py: a measured plan, whether it fits, and one message if memory runs out in training (traps 38, 65, 83)."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from support import STEP, Run, make_model, make_tokenizer, save_checkpoint
from transformers import Trainer

import train_lora
import train_prompt_tuning
from finetuning.cli.memory import GIB
from finetuning.preprocessing.flags import DataArguments
from finetuning.training import dry_run
from finetuning.training.flags import OFFLOAD, memory_flags
from finetuning.training.memory import NF4


def read_plan(printed: str) -> dict[str, float]:
    lines = re.findall(r"^  (\S.*?) +([\d.]+)  (?:measured|computed)", printed, flags=re.M)
    return {name: float(size) for name, size in lines}


def read_remedies(printed: str) -> dict[str, tuple[float, str]]:
    """For each line of flags: the peak in GiB, and whether it fits."""
    lines = re.findall(r"^ +([\d.]+)  computed, (fits|too much) +(--.*)$", printed, flags=re.M)
    return {flags: (float(size), fits) for size, fits, flags in lines}


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_dry_run(run_main: Run, script: object, base_path: str, rows_path: str, tmp_path: Path) -> None:
    """The parts, the rows, the steps and the time; nothing is written, and a used folder is no obstacle."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine", encoding="utf-8")
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out --dry_run True"
    printed = run_main(script, *words.split(), "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    plan = read_plan(printed)
    parts = ["base weights", "adapter, gradients, optimizer", "activations", "logits", "Python and its libraries"]
    parts += ["kept by PyTorch for later"]
    assert list(plan) == [*parts, "peak", "other programs", "this machine has"]
    assert sum(plan[name] for name in parts) == pytest.approx(plan["peak"], abs=0.05)
    assert 0.1 < plan["peak"] < plan["this machine has"] and plan["other programs"] > 0
    assert "\nit fits\n" in printed and "computed" not in printed
    assert re.search(r"^the run: 12 rows, 6 steps of 8 rows, about \d+ s", printed, re.MULTILINE)
    assert not STEP.search(printed)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_plan_names_the_logits(run_main: Run, tmp_path: Path) -> None:
    """500 supervised tokens of a vocabulary of 60,000: 0.11 GiB of logits at a time, and no more with 1,000."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(vocab_size=60_000))
    for tokens in (500, 1000):
        rows = tmp_path / "rows.json"
        rows.write_text('[{"instruction": "a", "output": "' + "b" * tokens + '"}]', encoding="utf-8")
        words = f"--model_path {path} --data_path {rows} --output_dir {tmp_path}/out --dry_run True"
        plan = read_plan(run_main(train_lora, *words.split(), "--max_length", 2000))
        assert 0.1 < plan["logits"] < 0.4


def test_gradients_and_the_states_of_the_optimizer_count(
    run_main: Run, plan_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 bytes for each trained weight: its gradient and the two numbers of AdamW."""
    measured, original = [], dry_run.measure
    monkeypatch.setattr(dry_run, "measure", lambda *args: measured.append(original(*args)) or measured[-1])
    printed = run_main(train_lora, *plan_flags)
    trained = int(re.search(r"^trainable +([\d,]+)", printed, re.M)[1].replace(",", ""))
    assert 12 * trained <= measured[0].training < 12.5 * trained
    run_main(train_lora, *plan_flags, "--optim", "adafactor")  # which keeps less
    assert 4 * trained < measured[1].training < 8 * trained
    # fp16's loss scaling skips the first steps, with the states that they would have made
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
    run_main(train_lora, *plan_flags)
    assert measured[2].training == measured[0].training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_token_keeps_with_and_without_dropout(
    run_main: Run, plan_flags: list[str], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Dropout keeps more, a masked copy and a mask; with checkpointing both are counted as without either."""
    measured, original = [], dry_run.measure
    monkeypatch.setattr(dry_run, "measure", lambda *args: measured.append(original(*args)) or measured[-1])
    run_main(train_lora, *plan_flags, "--gradient_checkpointing", checkpointing)
    inputs = 2 * 32 * 4  # of two layers
    assert measured[0].undropped > 4 * inputs
    assert (measured[0].kept == measured[0].undropped) == checkpointing and measured[0].kept >= measured[0].undropped


CHECKPOINTING, IN_4BIT, ONE_ROW, NO_DROPOUT, HALF = (
    "--gradient_checkpointing True",
    "--load_in_4bit True",
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 8",
    "--lora_dropout 0",
    "--max_length 300",
)


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are not tried before: what the tests put into the Trainer is meant for the run."""
    monkeypatch.setattr("finetuning.training.flags.try_out", Mock())


@pytest.fixture
def plan_flags(base_path: str, tmp_path: Path) -> list[str]:
    """A dry run on two rows, of 400 and 600 tokens."""
    rows = [{"instruction": "a", "output": "b" * (length - 24)} for length in (400, 600)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return (
        f"--model_path {base_path} --data_path {tmp_path}/rows.json --output_dir {tmp_path}/out --dry_run True".split()
    )


KEPT = 10_000  # bytes of a token


def set_memory(patch: pytest.MonkeyPatch, free: float) -> None:
    """A step that needs 20 GiB, 12 of them for the activations, on a device with so many GiB free; others hold 3."""
    sizes = {"before": 5, "training": 0.5, "activations": 12, "logits": 0.5, "reserved": 2}
    of_token = {"kept": KEPT, "undropped": 0.8 * KEPT}
    step = dry_run.Measurement(seconds=1, **{name: int(size * GIB) for name, size in sizes.items()}, **of_token)
    patch.setattr(dry_run, "measure", lambda *args: step)
    patch.setattr(dry_run, "memory_of_others", lambda device: 3 * GIB)
    patch.setattr(dry_run, "total_memory", lambda device: int((3 + free) * GIB))


def test_what_others_hold_and_what_pytorch_keeps_counts(
    run_main: Run, plan_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, fits in [(20, True), (19.9, False)]:
        set_memory(monkeypatch, free)
        printed = run_main(train_lora, *plan_flags)
        assert ("\nit fits\n" in printed) == fits
        assert (f"it does not fit into the {free:.2f} GiB that are free" in printed) != fits


def test_flags_that_would_make_it_fit(run_main: Run, plan_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag alone; together only if none is enough."""
    with_4bit = dry_run.measure_size
    matrices = int(3 * GIB / (4 - NF4)) // 2  # of each of two layers
    monkeypatch.setattr(
        dry_run, "measure_size", lambda model: with_4bit(model)._replace(layer=matrices, matrices=matrices, largest=0)
    )
    # with checkpointing a half, one of two layers, and the inputs of both: 32 numbers of 4 bytes
    share = 0.5 + 2 * 32 * 4 / KEPT
    half = 8 + 12 * 0.6  # 300 tokens of each of the two rows
    alone = {CHECKPOINTING: 8 + 12 * share, IN_4BIT: 17, ONE_ROW: half, NO_DROPOUT: 8 + 12 * 0.8, HALF: half}
    set_memory(monkeypatch, free=16)
    remedies = read_remedies(run_main(train_lora, *plan_flags))
    assert list(remedies) == list(alone)
    for flags, size in alone.items():
        assert remedies[flags] == (pytest.approx(size, abs=0.006), "fits" if size <= 16 else "too much")
    set_memory(monkeypatch, free=7.5)
    remedies = read_remedies(run_main(train_lora, *plan_flags))
    two, three = f"{CHECKPOINTING} {IN_4BIT}", f"{CHECKPOINTING} {IN_4BIT} {ONE_ROW}"
    undropped = 0.5 * 0.8 + 2 * 32 * 4 / KEPT
    together = {two: 5 + 12 * share, three: 5 + 12 * share * 0.6, f"{three} {NO_DROPOUT}": 5 + 12 * undropped * 0.6}
    together[f"{three} {NO_DROPOUT} {HALF}"] = 5 + 12 * undropped * 0.3
    assert list(remedies) == [*alone, *together]
    for flags, size in (alone | together).items():
        assert remedies[flags] == (pytest.approx(size, abs=0.006), "fits" if size <= 7.5 else "too much")
    set_memory(monkeypatch, free=6)
    assert "none of this is enough" in run_main(train_lora, *plan_flags)
    printed = run_main(train_lora, *plan_flags, *f"{CHECKPOINTING} {IN_4BIT} --max_length 500".split())
    assert list(read_remedies(printed))[:2] == [ONE_ROW, "--max_length 250"]


def test_memory_runs_out_in_the_dry_run(run_main: Run, plan_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rows would need is computed; if there is no room even for a few tokens, the run ends."""

    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    fits = read_plan(run_main(train_lora, *plan_flags))
    monkeypatch.setattr(Trainer, "training_step", run_out)
    computed_steps, original = [], dry_run.measure
    monkeypatch.setattr(dry_run, "measure", lambda *args: computed_steps.append(original(*args)) or computed_steps[-1])
    printed = run_main(train_lora, *plan_flags)
    computed = re.findall(r"^  (\S+) +[\d.]+  computed, as memory ran out$", printed, flags=re.M)
    assert computed == ["activations", "logits", "peak"]
    plan = read_plan(printed)
    assert plan.keys() == fits.keys() and plan["activations"] < 0.1 < plan["peak"]
    assert computed_steps[0].activations == computed_steps[0].kept * 1000 > 0 and computed_steps[0].logits > 0
    assert "it does not fit into the " in printed  # even if the device has more: it did run out
    assert read_remedies(printed).keys() == {CHECKPOINTING, IN_4BIT, ONE_ROW, NO_DROPOUT, HALF}
    assert printed.strip().endswith("the run: 2 rows, 3 steps of 8 rows")
    monkeypatch.setattr(dry_run, "count_kept", run_out)
    message = run_main(train_lora, *plan_flags, expected=1)
    assert "2.00 GiB more were needed" in message and CHECKPOINTING in message


def test_out_of_memory_message(
    run_main: Run, base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 38: the need, and the flags that are not used yet, in order."""

    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "training_step", run_out)
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out".split()
    message = run_main(train_lora, *words, expected=1)
    assert "2.00 GiB more were needed" in message
    remedies = ["--gradient_checkpointing True", "--load_in_4bit True", "--per_device_train_batch_size 1 "]
    assert 10 < (half := int(re.search(r"--max_length (\d+)$", message)[1])) < 30  # of the longest row
    places = [message.index(words) for words in [*remedies, "--gradient_accumulation_steps 8", f"--max_length {half}"]]
    assert places == sorted(places)
    monkeypatch.setattr(dry_run, "count_kept", run_out)
    more = "--gradient_checkpointing True --per_device_train_batch_size 1 --max_length 400 --dry_run True"
    message = run_main(train_lora, *words, *more.split(), expected=1)
    assert "--gradient_checkpointing" not in message and "batch_size" not in message and "--max_length 200" in message


def test_other_runtime_errors_keep_their_traceback(
    run_main: Run, base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "training_step", break_down)
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out".split()
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(train_lora, *words)


def test_offload_is_the_next_step_after_checkpointing_on_a_gpu() -> None:
    def advised(device: str, kwargs: dict[str, bool] | None, checkpointing: bool = True) -> bool:
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1}
        how = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": kwargs}
        args = SimpleNamespace(
            training=SimpleNamespace(**sizes, **how, device=torch.device(device)),
            data=DataArguments(max_length=100),
            model=SimpleNamespace(load_in_4bit=True),
            method=SimpleNamespace(),
        )
        return OFFLOAD in memory_flags(args).values()

    assert advised("cuda", None) and advised("cuda", {"use_reentrant": False})
    assert not advised("cuda", {"offload": True}) and not advised("cpu", None) and not advised("cuda", None, False)
