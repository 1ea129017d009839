"""The pages: their commands are run on models/tiny-qwen or parsed, their links lead somewhere, both languages agree."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from support import REPOSITORY
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer

import inference
import train_lora
from finetuning.cli.arguments import ModelArguments
from finetuning.generation.evaluate import load_rows
from finetuning.generation.generate import batches_by_length, encode_question, generate, make_generation_config
from finetuning.training.collators import FlattenCollator

PATTERNS = ["*.md", "data/*.md", "docs/*.md", "examples/**/*.md", "models/*.md", "tests/*.md"]
PAGES = sorted({str(path.relative_to(REPOSITORY)) for pattern in PATTERNS for path in REPOSITORY.glob(pattern)})
ENGLISH = [page for page in PAGES if page.replace(".md", "_zh.md") in PAGES]
CHINESE = [page for page in PAGES if page.endswith("_zh.md")]
WITH_COMMANDS = [page for page in PAGES if "```bash" in (REPOSITORY / page).read_text(encoding="utf-8")]
PACKAGE = REPOSITORY / "finetuning"
SCRIPTS = sorted(path.stem for path in REPOSITORY.glob("*.py") if "def main()" in path.read_text(encoding="utf-8"))


def shell_commands(readme: str) -> list[list[str]]:
    """The words of each command in the bash blocks of a README."""
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands: list[list[str]] = []
    for line in lines:
        commands.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|"):
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def code_blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / readme).read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the repository, in which `python train_lora.py` has been run."""
    folder = tmp_path_factory.mktemp("clone")
    for path in REPOSITORY.iterdir():
        if path.suffix == ".py" or path.name in ("data", "models"):
            (folder / path.name).symlink_to(path)
    result = run(folder, "train_lora.py")
    assert re.search(r"^ +480 +3.00 ", result.stdout, flags=re.M)  # the last step
    (folder / "printed.txt").write_text(result.stdout, encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


class Parsed(Exception):
    """All flags of a command exist and have values of their types."""


def stop_after_parsing(*args: object) -> None:
    raise Parsed


# Programs that are not of this repository: what the pages say of them has not been run here, and the pages say so.
OTHER_PROGRAMS = [
    "cd",
    "head",
    "llama-server",
    "ollama",
    "printf",
    "transformers",
    "vllm",
    "python -m sglang.launch_server",
]
OTHER_PROGRAMS += ["mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
IN_THE_TEXT = ["train_dora.py"]  # see test_contributing.py


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a command names exists: its files, its flags and those of its launcher."""
    while len(words) > 1 and re.fullmatch(r"\w+=[^$]*", words[0]):
        words = words[1:]
    program, *rest = words
    if any(" ".join(words).startswith(other) for other in OTHER_PROGRAMS):
        return
    if program == "pip":
        for file in (word for flag, word in zip(rest, rest[1:], strict=False) if flag in ("-r", "-c")):
            assert (REPOSITORY / file).is_file()
    elif program == "srun":
        check_command(rest, monkeypatch)
    elif program == "torchrun":
        launcher = get_args_parser().parse_args(rest)
        check_command(["python", launcher.training_script, *launcher.training_script_args], monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        launcher = launch_command_parser().parse_args(rest[1:])
        assert (REPOSITORY / launcher.config_file).is_file()
        check_command(["python", launcher.training_script, *launcher.training_script_args], monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((REPOSITORY / word).exists() for word in rest if "/" in word)
    elif program == "python" and (rest[0] == "-m" or (REPOSITORY / rest[0]).parent == REPOSITORY):
        name, flags = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0].removesuffix(".py"), rest[1:])
        if rest[0] not in IN_THE_TEXT:
            check_flags(name, flags, monkeypatch)
    elif program == "python":  # a script of the tests or the data
        text = (REPOSITORY / rest[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in rest if word.startswith("--"))
    else:
        assert program == "ruff" or re.fullmatch(r"\w+=.*", program), f"who checks {' '.join(words)}?"


def check_flags(module: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.cli.arguments.ScriptParser.to_dataclasses", stop_after_parsing)
    monkeypatch.setattr("sys.argv", [f"{module}.py", *flags])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_parses(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in shell_commands(page):
        check_command(command, monkeypatch)


def test_pages_with_commands() -> None:
    pages = {"README.md", "CONTRIBUTING.md", "docs/inference.md", "docs/scaling.md", "docs/serving.md", "docs/speed.md"}
    assert pages <= set(WITH_COMMANDS)
    assert len(shell_commands("README.md")) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page: str) -> None:
    files = (
        *REPOSITORY.glob("*.py"),
        *PACKAGE.rglob("*.py"),
        *REPOSITORY.glob("benchmarking/*.py"),
        *REPOSITORY.glob("tests/*.py"),
    )
    known = "".join(path.read_text(encoding="utf-8") for path in files)
    from transformers import TrainingArguments

    launchers = {"signal", "shutdown", "machine_rank"}  # of Slurm, torchrun and accelerate, in docs/scaling.md
    for name in re.findall(r"`--(\w+)", (REPOSITORY / page).read_text(encoding="utf-8")):
        declared = f"    {name}:" in known or f'add_argument("--{name}"' in known
        assert declared or name in TrainingArguments.__dataclass_fields__ or name in launchers, name


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path)):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("english", ENGLISH)
def test_languages_are_in_step(english: str) -> None:
    """Same commands, same code, same data, same figures, same headings, lists and tables, same files linked."""
    chinese = english.replace(".md", "_zh.md")
    one, other = ((REPOSITORY / name).read_text(encoding="utf-8") for name in (english, chinese))
    for pattern in (r"```bash\n.*?```", r"```python\n.*?```", r"```json\n.*?```"):
        assert re.findall(pattern, one, flags=re.S) == re.findall(pattern, other, flags=re.S)
    for pattern in (r"^#+ ", r"^(?:- |\d\. |\|)", r"^\| `?--\w+", r"^!\["):
        assert re.findall(pattern, one, flags=re.M) == re.findall(pattern, other, flags=re.M)
    figures = (sorted(re.findall(r"\b\d+(?:[.,]\d+)+\b", text, flags=re.ASCII)) for text in (one, other))
    assert len({tuple(each) for each in figures}) == 1
    links = (re.findall(r"\]\(([^)#\s]+)", text) for text in (one, other))
    files = [sorted({link.replace("_zh.", ".") for link in each} - {Path(english).name}) for each in links]
    assert files[0] == files[1]


def test_every_page_has_its_sister() -> None:
    assert [page.replace("_zh.md", ".md") for page in CHINESE] == ENGLISH
    assert {page for page in PAGES if page.startswith("docs/")} <= {*ENGLISH, *CHINESE}
    assert {"README.md", "CONTRIBUTING.md"} <= set(ENGLISH)
    english, chinese = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8").split("## 安全")
    for pattern in (r"`[^`]+`", r"^- \*\*", r"\]\(tests"):
        assert sorted(re.findall(pattern, english, re.M)) == sorted(re.findall(pattern, chinese, re.M))


def test_readme_is_short() -> None:
    for name in ("README.md", "README_zh.md"):
        assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) < 220


def test_pictures_are_those_of_their_script() -> None:
    script = runpy.run_path(str(REPOSITORY / "docs/make_pictures.py"))
    pictures = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs/pictures").iterdir()}
    assert script["make_pictures"]() == pictures
    shown = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]
    for name, picture in pictures.items():
        ElementTree.fromstring(picture)
        assert f"(docs/pictures/{name})" in shown["_zh" in name]


@pytest.mark.parametrize(("name", "virtual_tokens"), [("BATCH", 0), ("SOFT_BATCH", 3)])
def test_pictures_show_the_batch_as_it_is(name: str, virtual_tokens: int) -> None:
    script = runpy.run_path(str(REPOSITORY / "docs/make_pictures.py"))
    rows = [
        {"input_ids": [1] * (prompt + answer), "labels": [-100] * prompt + [1] * answer}
        for prompt, answer in script[name]
    ]
    batch = FlattenCollator(virtual_tokens)(rows)
    assert batch["position_ids"].flatten().tolist() == script["position_ids"](script[name], virtual_tokens)
    assert batch["logits_to_keep"].tolist() == LOGITS[name]


# Positions of the batch whose logits are computed: the token before each supervised one.
LOGITS = {"BATCH": [4, 5, 6, 10, 11, 19, 20, 21, 22], "SOFT_BATCH": [6, 7, 8, 15, 16]}


def test_citation() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "version", "license", "authors"} <= citation.keys()
    assert citation["title"] == (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix(
        "# "
    )
    assert citation["license"] == "Apache-2.0" and "Version 2.0" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")


def test_every_trap_has_tests_that_exist() -> None:
    """The table of tests/README.md."""
    table = (REPOSITORY / "tests/README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\| (\w+) \|", table, flags=re.M)
    known = [
        *range(1, 26),
        "25b",
        *range(26, 29),
        *range(30, 86),
        90,
        91,
        92,
        *range(94, 97),
        *range(98, 105),
        *range(106, 111),
    ]
    assert numbers == list(map(str, known))
    for file, name in re.findall(r"`(\w+\.py)::(\w+)`", table):
        (path,) = (REPOSITORY / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 50: a bare % in a help text breaks --help. Ours has units and defaults, and every training argument."""
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script}.py" in text
    if script.startswith("train_"):
        from transformers import TrainingArguments

        for name in TrainingArguments.__dataclass_fields__:
            assert f"--{name}" in text
        for words in ["longest row, in tokens", "(default: 1024)", "rank of the update", "data:", "LoRA:"]:
            assert words in " ".join(text.split()) or "lora" not in script


@pytest.mark.slow
def test_first_command(workplace: Path) -> None:
    """`python train_lora.py`: what it shows."""
    printed = (workplace / "printed.txt").read_text(encoding="utf-8")
    for words in [
        "data/train.json: 1,280 rows, all kept",
        "4 of 4 layers",
        "trainable   ",
        "reads  'Instruction: ",
        "writes '\\nOutput: ",
        "step  epoch      loss",
        "tokens/s, peak memory",
        "python inference.py --adapter_path outputs/lora",
    ]:
        assert words in printed


# What the README's questions are answered with, by a part of each command.
ANSWERS = {
    "早安": "Good morning\n",
    "--output_file": "240 rows answered, 0 of the answers cut",
    "--tasks sentiment": "| sentiment |   44 |      100.0% |",
    "--labels 正面": "正面\t0.9",
    "--interactive": "Instruction: \n",
}


@pytest.fixture(scope="session")
def answers(workplace: Path) -> dict[str, str]:
    """What each command that asks the adapter prints, by a part of the command."""
    block = next(block for block in code_blocks("README.md", "bash") if "--interactive" in block)
    commands = block.splitlines()
    assert len(commands) == len(ANSWERS) and all(map(str.__contains__, commands, ANSWERS))
    return {
        part: run(workplace, *shlex.split(command)[1:]).stdout for part, command in zip(ANSWERS, commands, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", ANSWERS)
def test_questions_of_the_readme(part: str, answers: dict[str, str]) -> None:
    """Each command that asks the adapter is run, and answers what a reader would expect."""
    assert ANSWERS[part] in answers[part]


@pytest.mark.slow
def test_next_command(workplace: Path, answers: dict[str, str]) -> None:
    """The command that training prints at its end, which is the README's first, and the one without arguments."""
    command = (workplace / "printed.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert shlex.split(command) == next(words for words in shell_commands("README.md") if "早安" in words)
    assert answers["早安"].splitlines()[-1] == "Good morning"
    assert run(workplace, "inference.py").stdout.count('"prediction"') == 8


def read_scores(printed: str) -> dict[str, tuple[int, float, float]]:
    """Rows, exact match and chrF (0 if it has none) of each task."""
    rows = re.findall(r"\| (\w+) +\| +(\d+) \| +([\d.]+)% \| +[\d.]* \| +[\d.]* \| +([\d.]*) \|", printed)
    return {task: (int(count), float(exact), float(chrf or 0)) for task, count, exact, chrf in rows}


@pytest.mark.slow
def test_results(workplace: Path, answers: dict[str, str]) -> None:
    """Translation and classification rows: exact match under 20% for the base, at least 95% with the adapter."""
    command = "inference.py --model_path models/tiny-qwen --data_path data/test.json --max_new_tokens 64"
    printed = {"base": run(workplace, *command.split()).stdout, "lora": answers["--output_file"]}
    scores = {name: read_scores(text) for name, text in printed.items()}
    assert all(scores[name]["all"][0] == 240 for name in scores)
    tasks = ["translate_zh_en", "translate_en_zh", "sentiment", "topic"]
    rows = sum(scores["base"][task][0] for task in tasks)
    exact = {name: sum(s[task][0] * s[task][1] for task in tasks) / rows for name, s in scores.items()}
    assert exact["base"] < 20
    assert exact["lora"] >= 95
    for task in ("rewrite", "complete"):
        assert scores["lora"][task][2] > scores["base"][task][2]


@pytest.fixture(scope="session")
def prompt_tuning(workplace: Path) -> Path:
    run(workplace, "train_prompt_tuning.py", "--num_virtual_tokens", "20")
    return workplace / "outputs/prompt_tuning"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_batches_answer_as_single_rows(
    method: str, workplace: Path, prompt_tuning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of data/test.json, token for token; every answer ends on a stop token."""
    monkeypatch.chdir(workplace)
    model_args = ModelArguments(model_path=None, load_in_4bit=None)
    model, tokenizer, info = inference.load_for_inference(model_args, f"outputs/{method}")
    prompts = [encode_question(row, tokenizer) for row in load_rows("data/test.json")]
    config = make_generation_config(tokenizer, 256)
    answers = {}
    for batch_size in (1, 16):
        answers[batch_size] = dict.fromkeys(range(240))
        for numbers in batches_by_length(prompts, batch_size):
            batch = generate(model, tokenizer, [prompts[number] for number in numbers], config)
            answers[batch_size] |= {n: answer.token_ids for n, answer in zip(numbers, batch, strict=True)}
    assert answers[1] == answers[16]
    assert all(ids[-1] in info["stop_token_ids"] for ids in answers[1].values())


@pytest.mark.slow
def test_prompt_tuning_results(workplace: Path, prompt_tuning: Path) -> None:
    """Classification rows: at least 90% with a tuned prompt; and with the labels given, an answer is always a label."""
    command = "inference.py --adapter_path outputs/prompt_tuning --data_path data/test.json --tasks sentiment,topic"
    assert read_scores(run(workplace, *command.split()).stdout)["all"][1] >= 90
    printed = run(workplace, *command.split(), "--labels", "auto").stdout
    assert read_scores(printed)["all"][1] >= 90
    others = re.findall(r"^\| \w+ +\|.* (\d+) \|$", printed.split("(other)", 1)[1], flags=re.M)
    assert len(others) >= 12 and set(others) == {"0"}


def test_contract_snippet_runs(
    trained: Callable[..., Path], base_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's Python, word for word apart from the paths; `.half()` on a CPU too."""
    snippet = "".join(code_blocks("README.md", "python"))
    for path, ours in {"path/to/qwen": base_path, "outputs/lora": str(trained(train_lora))}.items():
        assert f'"{path}"' in snippet
        snippet = snippet.replace(path, ours)
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("Instruction: 翻译为英文\nInput: 早安")


@pytest.mark.slow
def test_contract_snippet(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On models/tiny-qwen, with the adapter of the first command: the answer that the README promises."""
    imports, snippet = (text.replace("path/to/qwen", "models/tiny-qwen") for text in code_blocks("README.md", "python"))
    monkeypatch.chdir(workplace)
    exec(imports + snippet, {})
    text = capsys.readouterr().out.strip()
    assert text == "Instruction: 翻译为英文\nInput: 早安\nOutput: Good morning<|endoftext|>"


def test_sample_data() -> None:
    """At least 1,000 and 200 rows, several tasks, and no test question among the training rows."""
    train, test = (json.loads((REPOSITORY / f"data/{name}.json").read_text("utf-8")) for name in ("train", "test"))
    assert len(train) >= 1000 and len(test) >= 200
    assert {row["task"] for row in train} == {row["task"] for row in test} and len({row["task"] for row in test}) >= 6
    # nor, in either direction, a test sentence as a training answer
    seen = {row["input"] for row in train} | {row["output"] for row in train}
    for row in test:
        assert row["input"] not in seen or not row["input"]
        if row["task"] not in ("sentiment", "topic"):
            assert row["output"] not in seen
    questions = [(row["instruction"], row["input"]) for row in train + test]
    assert len(set(questions)) == len(questions)


def test_tiny_qwen_ships_small() -> None:
    folder = REPOSITORY / "models/tiny-qwen"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    text = "你好 Hello\n\t🙂 e\u0301 <|x|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == __import__("unicodedata").normalize("NFC", text)
