"""Several processes train the same adapter as one, stop together, and resume."""

import json
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import psutil
import pytest
from soak import soak
from support import REPOSITORY, STEP, TORCHRUN, Run, difference, launch, logged, make_rows
from torch.utils.data import BatchSampler

import train_lora
import train_prompt_tuning
from finetuning.cli import console
from finetuning.distributed import EqualTurns, check_engine, engine_asked_for
from finetuning.training.callbacks import StopOnSignal
from finetuning.training.checkpoints import differences, find_broken_part, find_checkpoints, must_match
from finetuning.training.collators import FlattenCollator, PadCollator
from finetuning.training.flags import parse_arguments

SCRIPTS = {"train_lora": train_lora, "train_prompt_tuning": train_prompt_tuning}
ROWS = 13  # which neither 4 nor 16 divides


@pytest.fixture(scope="module")
def thirteen_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"Say {n}", "output": "so " * (1 + n % 5) + str(n)} for n in range(ROWS)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def words(base_path: str, thirteen_rows: str) -> list[str]:
    """Two epochs, of which every step is logged, and every second one saved."""
    flags = (
        f"--model_path {base_path} --data_path {thirteen_rows} --num_train_epochs 2 --logging_steps 1 --save_steps 2"
    )
    return f"{flags} --save_total_limit 9 --keep_checkpoints True --eval_metrics False --disable_tqdm True".split()


def method(script: str) -> list[str]:
    return ["--lora_dropout", "0"] if script == "train_lora" else ["--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def together(words: list[str], thirteen_rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the runs of two processes, two rows each, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    commands = []
    for script, steps in product(SCRIPTS, (1, 4)):
        accumulation = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", steps]
        accumulation += ["--eval_data_path", thirteen_rows, "--per_device_eval_batch_size", "2"]
        commands.append([script, *words, *accumulation, *method(script), "--output_dir", folder / f"{script}-{steps}"])
    dropout = ["train_lora", *words, "--per_device_train_batch_size", "2", "--lora_dropout", "0.1"]
    resumed = ["--resume_from_checkpoint", folder / "whole/checkpoint-6", "--output_dir", folder / "resumed"]
    commands += [[*dropout, "--output_dir", folder / "whole"], [*dropout, *resumed]]
    return folder, launch(*commands)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "steps"), list(product(SCRIPTS, (1, 4))))
def test_two_processes_equal_one(
    run_main: Run,
    together: tuple[Path, str],
    words: list[str],
    thirteen_rows: str,
    tmp_path: Path,
    script: str,
    steps: int,
) -> None:
    """Rows of unequal length, in a number that does not divide; the adapter of two processes loads in one."""
    two, printed = together[0] / f"{script}-{steps}", together[1]
    sizes = f"--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps {steps}"
    flags = [*words, *sizes.split(), "--eval_data_path", thirteen_rows, *method(script)]
    run_main(SCRIPTS[script], *flags, "--output_dir", tmp_path / "one")
    assert logged(two) == pytest.approx(logged(tmp_path / "one"), abs=1e-5)
    assert logged(two, "eval_loss") == pytest.approx(logged(tmp_path / "one", "eval_loss"), abs=1e-5)
    assert difference(two, tmp_path / "one") < 1e-5  # and the names are the same
    assert printed.count("trainable ") == 6 and printed.count("2 (DDP), 2 rows each") == 4
    command = [sys.executable, "inference.py", "--adapter_path", two, "--instruction", "Say 1", "--max_new_tokens", "2"]
    if steps == 1:
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)


@pytest.mark.slow
def test_resumed_in_the_second_epoch(together: tuple[Path, str]) -> None:
    """With dropout: each process goes on with its own random numbers."""
    assert difference(together[0] / "whole", together[0] / "resumed") == 0


@pytest.mark.slow
def test_resumed_by_one_process(run_main: Run, together: tuple[Path, str], words: list[str], tmp_path: Path) -> None:
    """The rows of each step stay the same, in whichever way a step is divided."""
    two = together[0] / "train_lora-1"
    resume = ["--resume_from_checkpoint", two / "checkpoint-6", "--output_dir", tmp_path / "out", *method("train_lora")]
    message = run_main(train_lora, *words, "--per_device_train_batch_size", 2, *resume, expected=2)
    assert "x processes) 4, not 2" in message
    two_rows = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    printed = run_main(train_lora, *words, *two_rows, *resume)
    assert "resumed with 1 process(es) instead of 2" in printed
    assert difference(two, tmp_path / "out") < 1e-6


def settings(**changes: object) -> dict[str, object]:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    return {"seed": 1, **sizes, "processes": 2, "engine": None} | changes


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {"seed": 2}, "--seed 1, not 2"),
        ({}, {"per_device_train_batch_size": 4}, "x processes) 4, not 8"),
        ({"engine": "FSDP"}, {}, "engine FSDP, not None"),
        ({}, {"engine": "DeepSpeed"}, "engine None, not DeepSpeed"),
        ({"engine": "DeepSpeed"}, {"engine": "DeepSpeed", "processes": 4}, "processes 2, not 4"),
        ({}, {"processes": 1}, "x processes) 4, not 2"),
        ({}, {"processes": 1, "per_device_train_batch_size": 4, "seed": 2}, "--seed 1, not 2"),
        ({}, {"processes": 1, "per_device_train_batch_size": 4}, ""),
        ({"engine": "FSDP"}, {"engine": "FSDP", "processes": 4, "per_device_train_batch_size": 1}, ""),
    ],
)
def test_what_may_change(old: dict[str, object], new: dict[str, object], words: str) -> None:
    """The rows of a step stay, in whichever way they are divided."""
    saved, current = (must_match({}, {"settings": settings(**changes)}) for changes in (old, new))
    found = "; ".join(differences(saved, current))
    assert words in found and bool(words) == bool(found)
    del saved["--seed"]  # as in a checkpoint of an older version
    assert "--seed" not in "; ".join(differences(saved, current))


def test_each_row_once() -> None:
    batches = EqualTurns(BatchSampler(range(9), 2, drop_last=False), processes=4)
    assert list(batches) == [[0, 1], [2, 3], [4, 5], [6, 7], [8], [], [], []] and len(batches) == 8


@pytest.mark.parametrize("collator", [FlattenCollator(2), PadCollator(0, 2)], ids=["flattened", "padded"])
def test_a_process_without_rows(collator: FlattenCollator | PadCollator) -> None:
    """Its batch has the fields of every other, and no supervised tokens."""
    batch = collator([])
    assert batch.keys() == collator(make_rows()).keys()
    assert batch["input_ids"].tolist() == [[-1, -1, 0]] and batch["labels"].numel() == 0


# ---- what ends a run


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
@pytest.mark.parametrize("way", ["accelerate", "flag"])
def test_an_engine_that_is_not_granted(
    run_main: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch, engine: str, way: str
) -> None:
    """accelerate alone trains on, without it."""
    if way == "accelerate":
        monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
        more = []
    else:
        more = [f"--{engine.lower()}", "full_shard" if engine == "FSDP" else "config.json"]
    message = run_main(train_lora, *flags, *more, expected=2)
    assert f"{engine} was asked for, but there is no GPU" in message


def test_an_engine_needs_a_launcher_and_its_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        check_engine("FSDP", use_cpu=False)
    assert "started alone" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_engine("FSDP", use_cpu=False)
    monkeypatch.setattr("finetuning.distributed.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        check_engine("DeepSpeed", use_cpu=False)
    assert "pip install deepspeed" in capsys.readouterr().err


def test_no_engine_is_asked_for_by_default(flags: list[str]) -> None:
    args = parse_arguments(train_lora.LoraArguments, None, flags).training
    assert engine_asked_for(args) is None and args.average_tokens_across_devices and args.use_cpu


def test_only_the_main_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    monkeypatch.setattr(console.signal, "signal", lambda *args: waited.append(args))
    console.say("hello")
    console.warn("careful")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as stop:
        console.fail("no such file")
    assert stop.value.code == 2 and capsys.readouterr().err == "error: process 1: no such file\n"
    assert waited == [(signal.SIGTERM, signal.SIG_DFL), console.PATIENCE]  # in which torchrun ends it


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    """A run of two processes; returns it after its first step."""
    words = f"train_lora.py --max_steps 400 --per_device_train_batch_size 2 --logging_steps 1 --output_dir {out}"
    command = [*TORCHRUN, *words.split(), "--disable_tqdm", "True", *more]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(command, cwd=REPOSITORY, **options)
    for line in process.stdout:
        if STEP.match(line):
            break
    return process


def ranks(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    return {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    """torchrun hands the signal on and waits; its own exit code is 1, and that of its processes 130."""
    process = start(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 1
    assert printed.count("stopping after this step") == printed.count("error: stopped by SIGINT") == 1
    resume = next(line for line in printed.splitlines() if line.endswith("--resume_from_checkpoint True"))
    assert resume.startswith("python -m torch.distributed.run --standalone --nproc_per_node 2 train_lora.py ")
    (checkpoint,) = find_checkpoints(tmp_path / "out")
    assert find_broken_part(checkpoint) is None and not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_at_one_process(tmp_path: Path, number: int) -> None:
    """SIGTERM stops all at the same step, with a checkpoint; SIGKILL ends all, and torchrun names the killed one."""
    process = start(tmp_path / "out")
    ranks(process)["1"].send_signal(number)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    last = printed[printed.index("Root Cause") :]
    if number == signal.SIGKILL:
        assert "rank      : 1" in last and "(SIGKILL)" in last and not find_checkpoints(tmp_path / "out")
    else:
        assert "exitcode  : 143" in last and "error: stopped by SIGTERM" in printed
        (checkpoint,) = find_checkpoints(tmp_path / "out")
        assert find_broken_part(checkpoint) is None


@pytest.mark.slow
def test_a_mistake_is_named_once_and_last(tmp_path: Path) -> None:
    command = [*TORCHRUN, "train_lora.py", "--data_path", "nowhere.json", "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    message = "error: data file 'nowhere.json' does not exist"
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [message]
    last = result.stderr[result.stderr.index("Root Cause") :]
    assert "exitcode  : 2" in last and message in last.splitlines()[-2]


def test_processes_agree_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has caught, all learn after the step."""
    stop = StopOnSignal()
    stop.group = object()
    monkeypatch.setattr("finetuning.training.callbacks.dist.all_reduce", lambda caught, *rest: caught.fill_(15))
    control = stop.on_step_end(None, None, type("Control", (), {})())
    assert control.should_save and control.should_training_stop and stop.caught == signal.SIGTERM


def test_the_slower_process_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends SIGTERM when the first one has ended; its table shall show the code of the other one too."""
    happened = []
    monkeypatch.setattr("finetuning.training.callbacks.dist.barrier", happened.append)
    monkeypatch.setattr(signal, "signal", lambda *handler: happened.append(handler))
    stop = StopOnSignal()
    stop.caught, stop.group = signal.SIGTERM, "group"
    with pytest.raises(SystemExit) as exit_:
        stop.exit_if_caught()
    assert exit_.value.code == 143 and happened == ["group", (signal.SIGTERM, signal.SIG_IGN)]


@pytest.mark.slow
def test_killed_at_random() -> None:
    """The short form of `tests/soak.py --processes 2`."""
    count, weights = soak("train_lora.py", steps=60, kills=1, seed=1, processes=2)
    assert count and weights == 0.0
