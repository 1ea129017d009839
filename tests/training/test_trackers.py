"""`--report_to`: what is refused before the model is loaded, and SwanLab's run. The packages are stubs here."""

import re
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, Run

import train_lora

# What SwanLab 0.8 and later do where transformers 5.23 asks for a run, and what is logged.
SWANLAB = """
config, calls, logged = {}, [], []

def login():
    raise RuntimeError("no key\\nsecond line")

def init(**options):
    calls.append(options)

def get_run():
    if not calls:
        raise RuntimeError("No active Run. Call swanlab.init() first.")
    return "run"

def log(values, step):
    logged.append((step, values))
"""
NO_SERVER = "def search_experiments(max_results):\n    raise OSError('no such store')\n"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a package of that name, for one test."""

    def make(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return make


@pytest.mark.parametrize(
    ("value", "parts"),
    {
        "wandbb": ["wandbb is not supported", "wandb,"],  # no advice to install whatever has that name
        "neptune": ["pip install neptune"],
        "azure_ml": ["pip install azureml-mlflow"],
        "none,swanlab": ["none is not supported"],
    }.items(),
)
def test_what_is_not_there(run_main: Run, flags: list[str], value: str, parts: list[str]) -> None:
    """Trap 48: before the model is loaded."""
    message = run_main(train_lora, *flags, "--model_path", "no/such", "--report_to", value, expected=2)
    assert all(part in message for part in parts), message


def test_several(run_main: Run, flags: list[str], stub) -> None:
    stub("wandb", "")
    assert "pip install neptune" in run_main(train_lora, *flags, "--report_to", "wandb, neptune", expected=2)


@pytest.mark.parametrize(("name", "text"), [("swanlab", SWANLAB), ("wandb", SWANLAB), ("mlflow", NO_SERVER)])
def test_no_key_and_no_store(run_main: Run, flags: list[str], stub, name: str, text: str, monkeypatch) -> None:
    """One line of theirs and the remedy, before the model is loaded; nothing is asked for that needs no key."""
    stub(name, text)
    monkeypatch.delenv(f"{name.upper()}_MODE", raising=False)
    command = [*flags, "--model_path", "no/such", "--report_to", name]
    message = run_main(train_lora, *command, expected=2)
    assert f"--report_to {name}: no " in message and "second line" not in message
    assert ("MLFLOW_TRACKING_URI=sqlite" if name == "mlflow" else f"{name.upper()}_MODE=offline") in message
    assert "--model_path" in run_main(train_lora, *command, "--dry_run", "True", expected=2)
    if name != "mlflow":
        monkeypatch.setenv(f"{name.upper()}_MODE", "offline")
        assert "--model_path" in run_main(train_lora, *command, expected=2)


def test_tokens_are_not_recorded(run_main: Run, flags: list[str], stub) -> None:
    """wandb and SwanLab keep the command line. Without a tracker the flag is as good as ever."""
    stub("trackio", "")
    message = run_main(train_lora, *flags, "--report_to", "trackio", "--hub_token", "hf_secret", expected=2)
    assert "HF_TOKEN" in message and "hf_secret" not in message


def test_swanlab_has_a_run(run_main: Run, flags: list[str], stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback of transformers asks for SwanLab's run before it starts one."""
    stub("swanlab", SWANLAB)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_PROJECT", "weather")
    run_main(train_lora, *flags, "--report_to", "swanlab", "--run_name", "first", "--logging_steps", 2)
    import swanlab

    assert [(call["project"], call["experiment_name"], call["resume"]) for call in swanlab.calls] == [
        ("weather", "first", None)
    ]
    assert [step for step, values in swanlab.logged if "train/loss" in values] == [1, 2, 4, 6]


def test_the_pages_are_in_step() -> None:
    english, chinese = ((REPOSITORY / f"docs/tracking{name}.md").read_text(encoding="utf-8") for name in ("", "_zh"))
    for pattern in (r"```bash\n.*?```", r"^#+ ", r"\b\d+\.\d+\.\d+\b", r"^\| `\w+` \| `[^`]*`"):
        assert re.findall(pattern, english, flags=re.S | re.M) == re.findall(pattern, chinese, flags=re.S | re.M)
