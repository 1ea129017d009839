"""Whatever ends a run, the work since the last checkpoint is all that is lost (traps 39 and 41)."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from soak import SCRIPTS, soak

import checkpoints
import train_lora
from checkpoints import CheckpointTrainer, find_checkpoints

Run = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def flags(base_path: str, rows_path: str, tmp_path: Path) -> list[str]:
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out --lora_dropout 0.1 "
    return (words + "--per_device_train_batch_size 4 --max_steps 6 --save_steps 2 --disable_tqdm True").split()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(run_main: Run, base_path: str, rows_path: str, tmp_path: Path, number: int, code: int) -> None:
    """Trap 41: a checkpoint, the shell's exit code, and the command that goes on; then the same weights."""
    words = f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path}/out --max_steps 400 "
    words += "--per_device_train_batch_size 4 --logging_steps 1 --disable_tqdm True --overwrite_output_dir True"
    command = [sys.executable, "-u", "train_lora.py", *words.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment}
    process = subprocess.Popen(command, cwd=REPOSITORY, **options)
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(number)
    printed, errors = process.communicate()
    assert process.returncode == code, errors
    assert "stopping after this step" in printed and "Traceback" not in errors
    step = find_checkpoints(tmp_path / "out")[0].name
    assert not (tmp_path / "out/adapter_model.safetensors").exists() and step != "checkpoint-400"
    go_on = shlex.split(errors.strip().splitlines()[-1])
    assert go_on[:2] == ["python", "train_lora.py"] and go_on[-2:] == ["--resume_from_checkpoint", "True"]
    assert "--overwrite_output_dir" not in go_on
    run_main(train_lora, *go_on[2:])
    run_main(train_lora, *words.split(), "--output_dir", tmp_path / "whole")
    assert_equal(tmp_path / "out", tmp_path / "whole")


def test_a_second_signal_ends_at_once() -> None:
    from guards import StopOnSignal

    stop = StopOnSignal()
    stop.catch(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.catch(signal.SIGINT, None)


def test_an_interrupt_before_training_has_no_traceback() -> None:
    script = (
        "import _thread, time, train_lora\n"
        "train_lora.load_tokenizer = lambda *args: _thread.interrupt_main()\n"
        "train_lora.build_dataset = lambda *args: time.sleep(9)\n"
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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["_save_optimizer_and_scheduler", "_save_rng_state", "rename", "rotate"])
def test_checkpoints_are_whole_or_not_there(
    run_main: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Trap 39: a run that dies while it writes its third checkpoint."""
    with monkeypatch.context() as patch:
        calls = []

        def die(original: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: object, **kwargs: object) -> None:
                calls.append(args)
                if len(calls) == 3:
                    raise Killed
                return original(*args, **kwargs)

            return wrapped

        patch.setattr(checkpoints, "remove_leftovers", lambda folder: None)  # a dead process cleans nothing up
        if moment == "rename":
            patch.setattr(checkpoints.os, "replace", die(os.replace))
        elif moment == "rotate":
            patch.setattr(checkpoints, "rotate_checkpoints", die(checkpoints.rotate_checkpoints))
        else:
            patch.setattr(CheckpointTrainer, moment, die(getattr(CheckpointTrainer, moment)))
        with pytest.raises(Killed):
            run_main(train_lora, *flags)
    out = tmp_path / "out"
    assert all(checkpoints.find_broken_part(folder) is None for folder in find_checkpoints(out))
    assert find_checkpoints(out)[0].name == ("checkpoint-6" if moment == "rotate" else "checkpoint-4")
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    assert not list(out.glob(".saving*"))
    run_main(train_lora, *flags, "--output_dir", tmp_path / "whole")
    assert_equal(out, tmp_path / "whole")


def test_leftovers_are_not_in_the_way(run_main: Run, flags: list[str], tmp_path: Path) -> None:
    """A run that was killed while it wrote its first checkpoint may simply be started again."""
    (tmp_path / "out/.saving/checkpoint-2").mkdir(parents=True)
    run_main(train_lora, *flags)
    assert not (tmp_path / "out/.saving").exists()


def test_best_checkpoint_has_its_final_name(run_main: Run, flags: list[str], rows_path: str, tmp_path: Path) -> None:
    more = f"--eval_data_path {rows_path} --load_best_model_at_end True --keep_checkpoints True --eval_metrics False"
    run_main(train_lora, *flags, *more.split(), "--max_steps", 9)
    newest = find_checkpoints(tmp_path / "out")[0]
    best = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    assert Path(best).parent == tmp_path / "out" and Path(best).is_dir()
    assert_equal(Path(best), tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 7 MB, where two checkpoints need 8."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(run_main: Run, flags: list[str], small_disk: Path, tmp_path: Path) -> None:
    """The first checkpoint stays whole; with room made, the run goes on from it."""
    flags = [*flags, "--lora_r", "1024"]
    flags[flags.index(f"{tmp_path}/out")] = f"{small_disk}/out"
    message = run_main(train_lora, *flags, expected=1)
    assert "checkpoint-4 can not be written" in message and " MB are free" in message
    assert f"last whole checkpoint is {small_disk}/out/checkpoint-2" in message
    assert [path.name for path in (small_disk / "out").iterdir()] == ["checkpoint-2"]
    assert checkpoints.find_broken_part(small_disk / "out/checkpoint-2") is None
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    run_main(train_lora, *flags, "--output_dir", tmp_path / "whole")
    assert_equal(small_disk / "out", tmp_path / "whole")


def test_disk_that_is_full_at_the_end(run_main: Run, flags: list[str], small_disk: Path) -> None:
    """One checkpoint of 4 MB fits, and the adapter of 1.3 MB beside it, but not twice, as where another is replaced."""
    flags = [*flags, "--lora_r", "1024", "--save_steps", "6", "--output_dir", f"{small_disk}/out"]
    (small_disk / "other").write_bytes(bytes(2_500_000))
    message = run_main(train_lora, *flags, expected=1)
    assert "the adapter can not be written" in message and "--resume_from_checkpoint True" in message
    assert not (small_disk / "out/adapter_model.safetensors").exists()
    (small_disk / "other").unlink()
    run_main(train_lora, *flags, "--resume_from_checkpoint", "True")
    assert [path.name for path in (small_disk / "out").glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random(script: str) -> None:
    """The short form of tests/soak.py."""
    count, difference = soak(script, steps=40, kills=2, seed=1)
    assert count and difference == 0.0
