"""Fixtures: checkpoints, rows, and a way to run a script's main."""

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests check what happens without a GPU
os.environ["OMP_NUM_THREADS"] = "1"  # also in child processes: threads of several processes wait for each other

import torch
from support import Run, make_model, make_tokenizer, save_checkpoint, shorten_answers, six_steps

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

# A shell ignores SIGINT for what it starts in the background, and child processes inherit that. Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# For the property tests; `python -m pytest --hypothesis-profile thorough`, as in CI, tries ten times as many examples.
PROPERTIES = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("quick", max_examples=20, **PROPERTIES)
settings.register_profile("thorough", max_examples=200, **PROPERTIES)
settings.load_profile("quick")


def pytest_collection_finish() -> None:
    """Each run of the Trainer collects garbage: it need not search the modules, which stay, every time."""
    gc.collect()
    gc.freeze()


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
def flags(base_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of six steps, which answers in a few tokens at its end."""
    shorten_answers(monkeypatch)
    return six_steps(base_path, rows_path, tmp_path / "out")


@pytest.fixture(scope="session")
def trained(base_path: str, rows_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of six steps with some more flags, made once for all tests that read it.

    A test that changes the folder works on a copy: `shutil.copytree(trained(train_lora), tmp_path / "out")`.
    """
    folders: dict[tuple[str, ...], Path] = {}

    def train(script: ModuleType, *more: object) -> Path:
        words = (f"{script.__name__}.py", *map(str, more))
        if words not in folders:
            folder = tmp_path_factory.mktemp("trained") / "out"
            with pytest.MonkeyPatch.context() as patch:
                shorten_answers(patch)
                patch.setattr("sys.argv", [words[0], *six_steps(base_path, rows_path, folder), *words[1:]])
                script.main()
            folders[words] = folder
        return folders[words]

    return train


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
