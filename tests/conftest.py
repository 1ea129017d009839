"""Fixtures: checkpoints, rows, and a way to run a script's main."""

import json
import os
from pathlib import Path
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests check what happens without a GPU
os.environ["OMP_NUM_THREADS"] = "1"  # also in child processes: threads of several processes wait for each other

import torch
from support import Run, make_model, make_tokenizer, save_checkpoint

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model: eos is <|endoftext|>."""
    return save_checkpoint(tmp_path_factory.mktemp("base"), make_tokenizer(), make_model())


@pytest.fixture(scope="session")
def instruct_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An instruct model: eos is <|im_end|>."""
    folder = tmp_path_factory.mktemp("instruct")
    return save_checkpoint(folder, make_tokenizer("<|im_end|>"), make_model())


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    words = ["sun", "rain", "wind", "snow", "fog", "hail", "ice", "heat", "dew", "mist", "storm", "cloud"]
    rows = [{"instruction": f"Say {word}", "input": "", "output": word * (1 + n % 3)} for n, word in enumerate(words)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def flags(base_path: str, rows_path: str, tmp_path: Path) -> list[str]:
    """A run of six steps."""
    return (
        f"--model_path {base_path} --data_path {rows_path} --output_dir {tmp_path / 'out'} "
        "--per_device_train_batch_size 4 --max_steps 6 --disable_tqdm True"
    ).split()


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a script's main with some flags; returns what it printed on stdout.

    With `expected`, the script must end with that exit code and one or two lines of error, which are returned.
    """

    def run(module: ModuleType, *flags: object, expected: int | None = None) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        if expected is None:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            module.main()
        message = capsys.readouterr().err
        assert stop.value.code == expected, message
        assert "Traceback" not in message
        errors = message[message.index("error: ") :].strip().splitlines()
        assert len(errors) <= 2, message
        return "\n".join(errors)

    return run
