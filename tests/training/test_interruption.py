"""Whatever ends a run, only the work since the last checkpoint is lost (traps 39 and 41)."""

import dataclasses
import fcntl
import io
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from soak import SCRIPTS, soak
from support import REPOSITORY, STEP, Run, equal_weights, make_model
from transformers import TrainingArguments

import train_lora
from finetuning.model import folder
from finetuning.training import checkpoints
from finetuning.training.callbacks import StopOnSignal
from finetuning.training.checkpoints import CheckpointWriter, find_broken_part, find_checkpoints

MORE = ["--lora_dropout", "0.1", "--save_steps", "2"]


@pytest.fixture
def flags(flags: list[str]) -> list[str]:
    return [*flags, *MORE]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(run_main: Run, base_path: str, rows_path: str, tmp_path: Path, number: int, code: int) -> None:
    """Trap 41: a checkpoint, the shell's exit code, and the command to resume with; then the same weights."""
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out --max_steps 400 "
    words += "--per_device_train_batch_size 4 --logging_steps 1 --disable_tqdm True --overwrite_output_dir True"
    command = [sys.executable, "-u", "train_lora.py", *words.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment}
    process = subprocess.Popen(command, cwd=REPOSITORY, **options)
    for line in process.stdout:
        if STEP.match(line):
            break
    process.send_signal(number)
    printed, errors = process.communicate()
    assert process.returncode == code, errors
    assert "stopping after this step" in errors and "Traceback" not in errors and "error" not in printed
    step = find_checkpoints(tmp_path / "out")[0].name
    assert not (tmp_path / "out/adapter_model.safetensors").exists() and step != "checkpoint-400"
    resume = shlex.split(errors.strip().splitlines()[-1])
    assert resume[:2] == ["python", "train_lora.py"] and resume[-2:] == ["--resume_from_checkpoint", "True"]
    assert "--overwrite_output_dir" not in resume
    run_main(train_lora, *resume[2:])
    run_main(train_lora, *words.split(), "--output_dir", tmp_path / "whole")
    assert equal_weights(tmp_path / "out", tmp_path / "whole")


def test_a_second_signal_ends_at_once() -> None:
    stop = StopOnSignal()
    stop.catch(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.catch(signal.SIGINT, None)


def test_workers_of_the_data_loader_stay_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Trap 75: they inherit the handler, and a terminal sends Ctrl-C to all processes."""
    stop = StopOnSignal()
    process = multiprocessing.get_context("fork").Process(target=stop.catch, args=(signal.SIGINT, None))
    process.start()
    process.join()
    assert process.exitcode == 0 and capfd.readouterr().err == ""
    stop.catch(signal.SIGINT, None)
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_signal_in_the_middle_of_a_print(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """A write waits, as for a full pipe, and the handler runs meanwhile: the stream refuses a second write."""
    stop = StopOnSignal()

    class FullPipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            if not stop.caught:
                stop.catch(signal.SIGTERM, None)
            return len(data)

    stream = io.TextIOWrapper(io.BufferedWriter(FullPipe()), encoding="utf-8")
    monkeypatch.setattr(sys, name, stream)
    print("step 1", file=stream, flush=True)
    assert stop.caught == signal.SIGTERM and "stopping after this step" in capfd.readouterr().err


class Windows:
    """os as it is there: a folder cannot be opened, and only a file opened for writing can be flushed."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    def fsync(self, descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")


def test_windows(run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 77: checkpoints are written there too."""
    monkeypatch.setattr(folder, "os", Windows())
    run_main(train_lora, *flags, "--keep_checkpoints", True)
    assert [find_broken_part(folder) for folder in find_checkpoints(tmp_path / "out")] == [None, None]


@pytest.mark.slow
def test_an_interrupt_before_training_has_no_traceback() -> None:
    script = (
        "import _thread, time, train_lora\n"
        "train_lora.load_tokenizer = lambda *args: _thread.interrupt_main()\n"
        "train_lora.load_data = lambda *args: time.sleep(9)\n"
        "train_lora.main()"
    )
    command = [sys.executable, "-c", script, "--dry_run", "True"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr and result.stderr.endswith("stopped\n")


def test_signals_are_given_back(run_main: Run, flags: list[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_main(train_lora, *flags)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    stop = StopOnSignal()
    for _ in range(2):  # the Trainer begins anew with half the batch, after --auto_find_batch_size
        stop.on_train_begin(SimpleNamespace(world_size=1))
    stop.on_train_end(SimpleNamespace())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Killed(BaseException):
    pass


def die_at(original: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`original`, but the process dies in one of its calls, counted from 1."""
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    return wrapped


# What the Trainer and CheckpointWriter call for each checkpoint, and a call for the third one. Is that one complete?
MOMENTS = {
    "optimizer": (torch, "save", 10, False),
    "random state": (torch, "save", 12, False),
    "before the mark": (checkpoints, "flush_to_disk", 5, False),
    "after the mark": (checkpoints, "flush_to_disk", 6, True),
    "removal of the oldest": (checkpoints, "rotate_checkpoints", 3, True),
}


@pytest.mark.parametrize(("module", "name", "call", "whole"), MOMENTS.values(), ids=MOMENTS)
def test_killed_while_saving(
    run_main: Run,
    flags: list[str],
    trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    call: int,
    whole: bool,
) -> None:
    """Trap 39: a run that dies while it writes its third checkpoint, even if only one checkpoint is kept."""
    out, flags = tmp_path / "out", [*flags, "--save_total_limit", "1"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, die_at(getattr(module, name), call))
        run_main(train_lora, *flags)
    newest, before = find_checkpoints(out)
    assert (newest.name, before.name) == ("checkpoint-6", "checkpoint-4")
    assert find_broken_part(before) is None and (find_broken_part(newest) is None) == whole
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    assert equal_weights(out, trained(train_lora, *MORE))


def test_killed_while_replacing_a_checkpoint(
    run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from an earlier checkpoint, a run writes the later ones again: half old and half new is not complete."""
    out, flags = tmp_path / "out", [*flags, "--keep_checkpoints", "True", "--save_total_limit", "3"]
    run_main(train_lora, *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", die_at(torch.save, 2))
        run_main(train_lora, *flags, "--resume_from_checkpoint", out / "checkpoint-2")
    assert [find_broken_part(folder) is None for folder in find_checkpoints(out)] == [False, True]


class SignalAt(StopOnSignal):
    """Catches SIGTERM in a step, counted from 1."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.catch(signal.SIGTERM, None)


def names(out: Path) -> list[str]:
    return [path.name for path in find_checkpoints(out)]


def test_a_partial_checkpoint_outlives_no_complete_one(
    run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a killed run 4 is complete and 6 is partial. Resumed and stopped at 5, with --save_total_limit 1."""
    out, flags = tmp_path / "out", [*flags, "--save_total_limit", "1"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", die_at(torch.save, 10))
        run_main(train_lora, *flags)
    assert names(out) == ["checkpoint-6", "checkpoint-4"] and find_broken_part(out / "checkpoint-6")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("common.StopOnSignal", lambda: SignalAt(5))
        run_main(train_lora, *flags, "--resume_from_checkpoint", True)
    assert names(out) == ["checkpoint-5"] and find_broken_part(out / "checkpoint-5") is None


def test_an_abandoned_branch_goes(
    run_main: Run, flags: list[str], trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes from step 2 removes the checkpoints of steps 4 and 6, or `True` would choose them later."""
    out = tmp_path / "out"
    run_main(train_lora, *flags, "--keep_checkpoints", "True", "--save_total_limit", "3")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("common.StopOnSignal", lambda: SignalAt(3))
        run_main(train_lora, *flags, "--resume_from_checkpoint", out / "checkpoint-2")
    assert names(out) == ["checkpoint-3", "checkpoint-2"]
    run_main(train_lora, *flags, "--resume_from_checkpoint", True)
    assert equal_weights(out, trained(train_lora, *MORE))


def test_a_renamed_checkpoint(run_main: Run, flags: list[str], tmp_path: Path) -> None:
    """The run has its report: the step is read from the checkpoint, not from its name."""
    out, copy = tmp_path / "out", tmp_path / "backup"
    run_main(train_lora, *flags, "--keep_checkpoints", "True")
    shutil.copytree(out / "checkpoint-4", copy)
    run_main(train_lora, *flags, "--resume_from_checkpoint", copy)
    report = json.loads((out / "training_report.json").read_text(encoding="utf-8"))
    assert report["resumed_at_step"] == 4 and report["steps"] == 6


def test_not_to_resume(run_main: Run, flags: list[str]) -> None:
    """`--resume_from_checkpoint False` is no leave to replace a finished adapter."""
    run_main(train_lora, *flags)
    assert "already holds" in run_main(train_lora, *flags, "--resume_from_checkpoint", False, expected=2)


def test_an_adapter_is_replaced_as_a_whole(
    run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its files, a run leaves no old weights with a new configuration. The new ones are on the disk."""
    out = tmp_path / "out"
    run_main(train_lora, *flags)
    flushed: list[list[str]] = []
    flush = folder.flush_to_disk
    monkeypatch.setattr(
        folder, "flush_to_disk", lambda path: flushed.append([file.name for file in path.iterdir()]) or flush(path)
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(folder.os, "replace", die_at(os.replace, 2))
        run_main(train_lora, *flags, "--overwrite_output_dir", True, "--save_strategy", "no")
    assert not (out / folder.WEIGHTS).exists() and (out / folder.CONFIG).exists()
    assert len(flushed) == 1 and {folder.WEIGHTS, folder.CONFIG, folder.INFO} <= set(flushed[0])


def test_every_part_of_a_checkpoint_is_known(tmp_path: Path) -> None:
    """Whatever a GPU, FSDP or DeepSpeed adds: a part that is missing or shorter makes the checkpoint a partial one."""
    checkpoint = tmp_path / "checkpoint-2"
    parts = ["scaler.pt", "optimizer_0/__1_0.distcp", "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    for name in parts:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"12345678")
    args, state = SimpleNamespace(should_save=True, output_dir=str(tmp_path)), SimpleNamespace(global_step=2)
    state.best_model_checkpoint = None
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    CheckpointWriter({folder.INFO: "{}"}, None).on_save(args, state, None, model=model)
    assert (checkpoint / folder.WEIGHTS).exists() and find_broken_part(checkpoint) is None
    for name in (*parts, folder.WEIGHTS):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1])
        assert find_broken_part(checkpoint) == f"{name} is broken"
        (checkpoint / name).unlink()
        assert find_broken_part(checkpoint) == f"{name} is missing"
        (checkpoint / name).write_bytes(content)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("--optim adafactor", "--optim adamw_torch_fused, not adafactor"),  # its state has other fields: a traceback
        ("--weight_decay 0.5", "--weight_decay 0.0, not 0.5"),  # the saved optimizer would bring its own
        ("--adam_beta2 0.99", "--adam_beta2 0.999, not 0.99"),
        ("--lr_scheduler_type cosine", "--lr_scheduler_type linear, not cosine"),
        ("--max_steps 8", "--max_steps 6, not 8"),  # the learning rate would jump
        ("--max_grad_norm 0.5", "--max_grad_norm 1.0, not 0.5"),
        ("--eval_split 0.25", "--eval_split 0.0, not 0.25"),  # other rows to train on, of the same file
        ("--max_rows 8", "--max_rows None, not 8"),
        ("--seed 1 --optim sgd", "--optim adamw_torch_fused, not sgd; --seed 42, not 1"),
        ("--per_device_train_batch_size 2", "x processes) 4, not 2"),
    ],
)
def test_other_settings_are_refused(
    run_main: Run, flags: list[str], kept: Path, tmp_path: Path, changed: str, words: str
) -> None:
    message = run_main(
        train_lora, *flags, *changed.split(), "--resume_from_checkpoint", kept / "checkpoint-4", expected=2
    )
    assert words in message and "start anew with another --output_dir" in message


def other_values(field: dataclasses.Field) -> list[Any]:
    """Values of a field of TrainingArguments, by its type, that are not the ones of the run."""
    types = {*get_args(field.type), field.type}
    if bool in types:
        return [not field.default]
    if float in types:
        return [0.5, 2.0]
    if int in types:
        return [1, 8]
    enums = [kind for kind in types if isinstance(kind, type) and issubclass(kind, Enum)]
    return [member.value for kind in enums for member in kind]


# What says where or how to run, and what is refused or read before a checkpoint is.
NOT_TRIED = ("resume_from_checkpoint", "local_rank", "ddp_timeout")


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(TrainingArguments) if f.name not in NOT_TRIED], ids=lambda f: f.name
)
def test_what_changes_the_weights_is_refused(
    run_main: Run, flags: list[str], kept: Path, tmp_path: Path, field: dataclasses.Field
) -> None:
    """Trap 92, by trying: a field of TrainingArguments is refused in a resumed run, or it changes no weight."""
    for number, value in enumerate(other_values(field)):
        out = tmp_path / f"out-{number}"
        words = [*flags, "--sample_answers", 0, "--output_dir", out, "--resume_from_checkpoint", kept / "checkpoint-4"]
        try:
            run_main(train_lora, *words, f"--{field.name}", value)
        except SystemExit as stop:
            assert stop.code == 2
        else:
            assert equal_weights(out, kept), f"--{field.name} {value}"


def test_settings_that_may_change(run_main: Run, flags: list[str], kept: Path, rows_path: str, tmp_path: Path) -> None:
    """Memory ran out: the same rows in smaller batches. Reports and evaluation are free, too."""
    more = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --logging_steps 1 --save_steps 1"
    more += f" --gradient_checkpointing True --eval_data_path {rows_path} --eval_metrics False"
    run_main(train_lora, *flags, *more.split(), "--resume_from_checkpoint", kept / "checkpoint-4")
    report = json.loads((tmp_path / "out/training_report.json").read_text(encoding="utf-8"))
    assert (report["resumed_at_step"], report["steps"]) == (4, 6)


@pytest.fixture
def kept(trained: Callable[..., Path]) -> Path:
    return trained(train_lora, *MORE, "--keep_checkpoints", "True")


EPOCHS = ["--save_strategy", "epoch", "--save_total_limit", "1", "--logging_steps", "1"]  # of three steps


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_signal_at_the_end_of_an_epoch(
    run_main: Run,
    flags: list[str],
    trained: Callable[..., Path],
    rows_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluates: bool,
) -> None:
    """Its last step is saved at once; again only with the evaluation's result, and the first is there until then."""
    out, more = tmp_path / "out", [*EPOCHS, *MORE, "--eval_metrics", "False"]
    more += ["--eval_data_path", rows_path, "--load_best_model_at_end", "True"] if evaluates else []
    saves = []

    def save(*args: Any) -> None:
        saves.append([find_broken_part(path) is None for path in find_checkpoints(out)])
        torch_save(*args)

    torch_save = torch.save
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("common.StopOnSignal", lambda: SignalAt(6))
        patch.setattr(torch, "save", save)
        run_main(train_lora, *flags, *more, "--max_steps", 9)
    assert stop.value.code == 143 and names(out) == ["checkpoint-6"] and not list(out.glob("*before"))
    each = 4  # arguments, optimizer, schedule, random state
    assert len(saves) == each * (3 if evaluates else 2)
    assert all(any(complete) for complete in saves[each:])
    run_main(train_lora, *flags, *more, "--max_steps", 9, "--resume_from_checkpoint", True)
    whole = trained(train_lora, *more, "--max_steps", 9)
    assert equal_weights(out, whole)
    resumed, expected = (
        json.loads((path / "training_report.json").read_text(encoding="utf-8"))["history"] for path in (out, whole)
    )
    assert resumed == expected


def test_killed_while_saving_an_epoch_again(
    run_main: Run,
    flags: list[str],
    trained: Callable[..., Path],
    rows_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint of the same step, from before the evaluation, is resumed from.

    Without dropout, because evaluating draws a random number.
    """
    out, more = tmp_path / "out", [*EPOCHS, "--eval_metrics", "False", "--eval_data_path", rows_path]
    more += ["--lora_dropout", "0"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("common.StopOnSignal", lambda: SignalAt(3))
        patch.setattr(torch, "save", die_at(torch.save, 5))
        run_main(train_lora, *flags, *more)
    assert names(out) == ["checkpoint-3", "checkpoint-3-before"]
    assert [find_broken_part(path) is None for path in find_checkpoints(out)] == [False, True]
    run_main(train_lora, *flags, *more, "--keep_checkpoints", True, "--resume_from_checkpoint", True)
    assert names(out) == ["checkpoint-6"] and equal_weights(out, trained(train_lora, *more))


def test_a_signal_in_an_epoch_waits_for_no_evaluation(
    run_main: Run, flags: list[str], rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grace period of a cluster is short; and what is evaluated within an epoch might be chosen as the best."""
    evaluated: list[int] = []
    monkeypatch.setattr(
        SignalAt, "on_evaluate", lambda self, args, state, *rest, **more: evaluated.append(state.global_step)
    )
    more = [*EPOCHS, *MORE, "--eval_metrics", "False", "--eval_data_path", rows_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("common.StopOnSignal", lambda: SignalAt(5))
        run_main(train_lora, *flags, *more)
    assert evaluated == [3] and names(tmp_path / "out") == ["checkpoint-5"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # the last step of the run is evaluated
        patch.setattr("common.StopOnSignal", lambda: SignalAt(5))
        run_main(train_lora, *flags, *more, "--max_steps", 5, "--overwrite_output_dir", True)
    assert evaluated == [3, 3, 5]


def test_a_partial_first_checkpoint(run_main: Run, flags: list[str], tmp_path: Path) -> None:
    """A run that was killed while it wrote its first checkpoint: both ways out of it are named, and work."""
    (tmp_path / "out/checkpoint-2").mkdir(parents=True)
    message = run_main(train_lora, *flags, expected=2)
    assert "checkpoints, none of them complete" in message and "--resume_from_checkpoint" not in message
    message = run_main(train_lora, *flags, "--resume_from_checkpoint", "True", expected=2)
    assert "no complete checkpoint" in message and "--overwrite_output_dir True" in message
    run_main(train_lora, *flags, "--overwrite_output_dir", "True")
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_leftovers_are_not_in_the_way(run_main: Run, flags: list[str], tmp_path: Path) -> None:
    """A run that was killed while it wrote its adapter may simply be started again."""
    (tmp_path / "out/.saving").mkdir(parents=True)
    run_main(train_lora, *flags)
    assert not (tmp_path / "out/.saving").exists()


def test_best_checkpoint_has_its_final_name(run_main: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    more = f"--eval_data_path {rows_path} --load_best_model_at_end True --keep_checkpoints True --eval_metrics False"
    run_main(train_lora, *flags, *more.split(), "--max_steps", 9)
    newest = find_checkpoints(tmp_path / "out")[0]
    best = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    assert Path(best).parent == tmp_path / "out" and Path(best).is_dir()
    assert equal_weights(Path(best), tmp_path / "out")


class FullDisk(StopOnSignal):
    """Limits the size of every file, from a given step or from the end of training."""

    def __init__(self, size: int, step: int | None = None) -> None:
        super().__init__()
        self.size, self.step = size, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.fill()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_end(*args, **kwargs)
        if self.step is None:
            self.fill()

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the disk full in the next run; call it without arguments to make room."""

    def fill(*when: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        monkeypatch.setattr("common.StopOnSignal", (lambda: FullDisk(*when)) if when else StopOnSignal)

    yield fill
    fill()


@pytest.mark.parametrize("size", [1_000_000, 2_000_000])
def test_full_disk(
    run_main: Run,
    flags: list[str],
    trained: Callable[..., Path],
    full_disk: Callable[..., None],
    tmp_path: Path,
    size: int,
) -> None:
    """No room for an adapter of 1.3 MB, or for its optimizer: the run resumes from the first checkpoint."""
    out, large = tmp_path / "out", ["--lora_r", "1024"]
    whole, flags = trained(train_lora, *MORE, *large), [*flags, *large]
    full_disk(size, 2)
    message = run_main(train_lora, *flags, expected=1)
    assert "checkpoint-4 cannot be written" in message and " MB are free" in message
    assert f"last complete checkpoint is {out}/checkpoint-2" in message
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
    assert find_broken_part(out / "checkpoint-2") is None
    full_disk()
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    assert equal_weights(out, whole)


def test_disk_that_is_full_at_the_end(
    run_main: Run, flags: list[str], full_disk: Callable[..., None], tmp_path: Path
) -> None:
    """The adapter does not fit any more, but the last checkpoint is there."""
    out, flags = tmp_path / "out", [*flags, "--lora_r", "1024", "--save_steps", "6"]
    full_disk(1_000_000)
    message = run_main(train_lora, *flags, expected=1)
    assert f"{out} cannot be written" in message and "--resume_from_checkpoint True" in message
    assert not (out / "adapter_model.safetensors").exists()
    full_disk()
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    assert [path.name for path in out.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random(script: str) -> None:
    """The short form of tests/soak.py."""
    count, difference = soak(script, steps=40, kills=2, seed=1)
    assert count and difference == 0.0
