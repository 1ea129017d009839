"""The layout: imports run one way, CONTRIBUTING.md has every folder, and the scripts run from any folder."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import mutate
import pytest
from support import REPOSITORY

from finetuning.cli.arguments import beside_scripts
from finetuning.cli.commands import inference_command

PACKAGE = REPOSITORY / "finetuning"
# A folder imports from folders of a lower layer, and from itself.
LAYERS = {"cli": 0, "preprocessing": 1, "distributed": 2, "model": 3, "training": 4, "generation": 4, "merging": 5}
# A step of the data path imports only steps before it.
STEPS = ["flags", "files", "readers", "rows", "templates", "encode", "summary", "show", "dataset"]
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for path in (*REPOSITORY.glob("*.py"), *PACKAGE.rglob("*.py"), *REPOSITORY.glob("benchmarking/*.py"))
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("finetuning.")])
def test_imports_run_one_way(module: str) -> None:
    folder = module.split(".")[1]
    for other in imports(MODULES[module]):
        assert other.startswith("finetuning."), f"{module} imports {other}, which is not of the package"
        its_folder = other.split(".")[1]
        assert its_folder == folder or LAYERS[its_folder] < LAYERS[folder], f"{module} imports {other}: an arrow back"


def test_the_data_path_has_one_direction() -> None:
    prefix = "finetuning.preprocessing."
    assert {name.removeprefix(prefix) for name in MODULES if name.startswith(prefix)} == set(STEPS)
    for number, step in enumerate(STEPS):
        used = {other.removeprefix(prefix) for other in imports(MODULES[prefix + step]) if other.startswith(prefix)}
        assert used <= set(STEPS[:number]), f"{step} imports a later step"


def test_no_circle() -> None:
    TopologicalSorter({name: imports(path) for name, path in MODULES.items()}).prepare()  # raises a CycleError


def test_commands_import_no_command_but_the_benchmark() -> None:
    commands = {name for name in MODULES if "." not in name} - {"common"}
    for name in commands - {"benchmark"}:
        assert not imports(MODULES[name]) & commands
    assert not imports(MODULES["common"]) & commands
    assert not any(other.startswith("finetuning.training") for other in imports(MODULES["inference"]))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_every_folder_is_in_the_table(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == LAYERS.keys() - {"distributed"}  # which is a module
    for folder in folders:
        assert f"[{folder}/](finetuning/{folder})" in text
    for name, path in MODULES.items():
        assert path.stem in text, f"{page} does not mention {name}"


def test_each_mutant_has_its_place() -> None:
    """What `mutate.py` would take out occurs once, so that a change of the code changes the list too."""
    for mutant in mutate.MUTANTS:
        assert (REPOSITORY / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant
        assert list((REPOSITORY / "tests").rglob(f"{mutant.test.split()[0]}.py")), mutant


def test_folders_say_what_they_are() -> None:
    for path in (*PACKAGE.rglob("__init__.py"), REPOSITORY / "benchmarking/__init__.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) == 1
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_defaults_lie_beside_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 72: whatever the current folder is. So does the script of the command that a run ends with."""
    monkeypatch.chdir(REPOSITORY)
    assert beside_scripts("models/tiny-qwen") == "models/tiny-qwen"
    monkeypatch.chdir(tmp_path)
    assert beside_scripts("models/tiny-qwen") == str(REPOSITORY / "models/tiny-qwen")
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "train_lora.py")])
    assert inference_command("outputs/lora") == f"python {REPOSITORY / 'inference.py'} --adapter_path outputs/lora"


@pytest.mark.slow
def test_scripts_run_from_any_folder(tmp_path: Path) -> None:
    """With the default model and data, which lie beside the scripts."""
    command = [sys.executable, REPOSITORY / "train_lora.py", "--max_steps", "1", "--disable_tqdm", "True"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs/lora/adapter_model.safetensors").exists()
    next_command = result.stdout.strip().splitlines()[-1]
    assert next_command.startswith(f"python {REPOSITORY / 'inference.py'} --adapter_path outputs/lora ")


SILENT = ["train_lora", "train_prompt_tuning", "inference", "merge_adapter", "benchmark"]


def packages(module: str) -> list[str]:
    """What a module imports at its top from outside the standard library, in order."""
    names: list[str] = []
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [name.name for name in node.names]
    return [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]


@pytest.mark.parametrize("script", SILENT)
def test_console_is_imported_first(script: str) -> None:
    """It silences bitsandbytes, and imports nothing that brings it along."""
    assert packages(script)[0] == "finetuning.cli.console"
    assert packages("finetuning.cli.console") == ["tqdm"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SILENT)
def test_bitsandbytes_is_silenced_before_it_is_imported(script: str) -> None:
    """On some processors its remark on `gemm_4bit_forward` would be the first line that a newcomer sees."""
    code = (
        "import builtins, logging\n"
        "original, logger = builtins.__import__, logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "def watched(name, *rest, **more):\n"
        "    noisy = name.split('.')[0] in ('peft', 'bitsandbytes')\n"
        "    assert not noisy or not logger.isEnabledFor(logging.WARNING), name\n"
        "    return original(name, *rest, **more)\n"
        f"builtins.__import__ = watched\nimport {script}, sys\nprint('bitsandbytes' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.stdout == "True\n", result.stderr
