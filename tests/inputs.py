"""Inputs as people hold them, run through the real commands: what happens, the exit code, and the line that is shown.

    python tests/inputs.py        # writes the table, tests/INPUTS.md

The cases of the tests are reused. An input that is silently wrong, ends in a traceback, or gets the remedy for another
mistake, raises an AssertionError.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
for folder in ("tests/preprocessing", "tests/model", "tests", ""):
    sys.path.insert(0, str(REPOSITORY / folder))
os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""

import test_base_model
import test_files
import test_folder
import test_normalize
from support import CHATML, THINKERS, call_main, make_model, make_tokenizer, save_checkpoint
from transformers import TrainingArguments

import inference
import train_lora
from finetuning.preprocessing.flags import DataArguments
from finetuning.training.flags import RunArguments

TABLE = REPOSITORY / "tests/INPUTS.md"
ROW = {"instruction": "Say sun", "output": "sun"}
INFERENCE_FLAGS = set(inference.InferenceArguments.__dataclass_fields__) | {"model_path", "load_in_4bit"}
TRAINING_FLAGS = {*TrainingArguments.__dataclass_fields__, *DataArguments.__dataclass_fields__}
TRAINING_FLAGS |= {*RunArguments.__dataclass_fields__}
TRAINING_FLAGS |= {*train_lora.LoraArguments.__dataclass_fields__, "model_path", "load_in_4bit", "trust_remote_code"}


class Case(NamedTuple):
    what: str  # the input
    script: ModuleType
    flags: Callable[[Path], list[Any]]  # makes the input in an empty folder, and returns the command line
    words: list[str]  # of the line
    code: int = 2


def check(case: Case) -> str:
    """Run a case; returns the line that it shows, without the path of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        code, printed = call_main(case.script, case.flags(Path(folder)))
        printed = printed.replace(folder + "/", "").replace(str(REPOSITORY) + "/", "")
    assert code == case.code and "Traceback" not in printed, (case.what, printed)
    lines = [line for line in re.split("[\n\r]", printed) if all(word in line for word in case.words[:1])]
    assert lines, (case.what, case.words, printed)
    message = lines[-1] if code == 0 else printed[printed.index("error: ") :].strip().replace("\n", " ")
    assert all(word in message for word in case.words), (case.what, case.words, message)
    if code:
        known = INFERENCE_FLAGS if case.script is inference else TRAINING_FLAGS
        advised = set(re.findall(r"(?<!\w)(?<!train with )(?<!inference.py )--(\w+)", message)) - {"local"}
        assert advised <= known, (case.what, advised - known)
    return re.sub(r"\b\d+\.\d+\b|(?<=in )\d+(?= s)|[\d,]+(?= tokens/s)", "N", message.strip())


# ---- what the inputs are made of


def base(folder: Path, template: str = CHATML, **model: Any) -> Path:
    """A tiny model: a base model unless a template is given."""
    eos = "<|endoftext|>" if template is CHATML else "<|im_end|>"
    return Path(save_checkpoint(folder / "model", make_tokenizer(eos, template), make_model(**model)))


def rows(folder: Path, *rows: Any, name: str = "rows.json") -> Path:
    (folder / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder / name


def training(folder: Path, model: Path, data: Path, *more: Any) -> list[Any]:
    words = "--max_steps 1 --disable_tqdm True".split()
    return ["--model_path", model, "--data_path", data, "--output_dir", folder / "out", *words, *more]


def adapter(folder: Path, *more: Any, template: str = CHATML, data: list[Any] = (ROW,)) -> Path:
    """A trained adapter."""
    code, printed = call_main(train_lora, training(folder, base(folder, template), rows(folder, *data), *more))
    assert code == 0, printed
    return folder / "out"


def asking(folder: Path, adapter_path: Path, *more: Any) -> list[Any]:
    return ["--adapter_path", adapter_path, "--max_new_tokens", 4, *(more or ("--instruction", "Say sun"))]


# ---- the cases


def rows_cases() -> Iterator[Case]:
    for name, (row, _, answers) in test_normalize.GOOD.items():
        shown = ["writes", repr(answers[-1])[1:-1]]
        yield Case(f"{name}: `{json.dumps(row)}`", train_lora, lambda f, row=row: chat_rows(f, row), shown, 0)
    for name, (row, words) in test_normalize.BAD.items():
        yield Case(
            f"{name}: `{json.dumps(row)}`",
            train_lora,
            lambda folder, row=row: training(folder, base(folder), rows(folder, ROW, row)),
            ["row 2: ", *words],
        )
        if "'output'" not in words[0]:
            yield Case(
                f"{name}, in inference",
                inference,
                lambda folder, row=row: ["--model_path", base(folder), "--data_path", rows(folder, ROW, row)],
                ["row 2: ", *words],
            )
    thought = {"instruction": "Say sun", "output": "<think>\nhm\n</think>\n\n  sun\n"}
    for name, template in THINKERS.items():
        shown = ["writes", "hm\\n</think>\\n\\n  sun\\n<|im_end|>"]
        flags = partial(thinking, template=template)
        yield Case(f"a thought, and spaces around the answer; template `{name}`", train_lora, flags, shown, 0)
    yield Case(
        "a thought in 1 row of 3",
        train_lora,
        lambda folder: training(folder, base(folder, THINKERS["switch"]), rows(folder, thought, ROW, ROW)),
        ["asked to answer without reasoning"],
        0,
    )
    yield Case(
        "a column that means nothing here",
        train_lora,
        lambda folder: training(folder, base(folder), rows(folder, ROW | {"text": "x"})),
        ["ignored fields: text (1 rows)"],
        0,
    )
    yield Case(
        "columns instead of rows",
        train_lora,
        lambda folder: training(folder, base(folder), rows(folder, {"instruction": ["a"], "output": ["b"]})),
        ["row 1", "'instruction' is a list", "not a column"],
    )
    for name, (content, words) in test_normalize.FORMATS.items():
        yield Case(f"`{name}`", train_lora, lambda f, n=name, c=content: training(f, base(f), put(f, n, c)), words)
    yield Case("`rows.zip`", train_lora, lambda f: training(f, base(f), archive(f)), ["unzip"])
    yield Case("`*.json`", train_lora, lambda f: training(f, base(f), f / "*.json"), ["no file matches this pattern"])
    for form in ("csv", "tsv.gz", "jsonl.zst", "parquet"):
        flags = partial(given_file, name=f"rows.{form}", content=test_files.FORMS[form]([ROW]))
        yield Case(f"a good `rows.{form}`", train_lora, flags, ["1 rows, all kept"], 0)
    yield Case("a folder of two files", train_lora, two_files, ["2 files, from", "a.json", "b.csv"], 0)
    yield Case(
        "a folder without data",
        train_lora,
        lambda f: training(f, base(f), put(f, "empty/README.md", b"").parent),
        ["is not a file", "no data files"],
    )
    yield Case("a.json beside a.json.gz", train_lora, packed_twice, ["look like the same rows", "name only one"])
    question = {"question": "Say sun", "answer": "sun"}
    for flags, words in (
        ("", ["has no 'instruction'", "add --instruction_field question --output_field answer"]),
        ("--instruction_field question --output_field anwser", ["has no 'anwser'", "see --output_field anwser"]),
        ("--instruction_field question --messages_field answer", ["leave out the other"]),
    ):
        yield Case(
            f"`{json.dumps(question)}` {flags}",
            inference,
            lambda f, flags=flags: ["--model_path", base(f), "--data_path", rows(f, question), *flags.split()],
            words,
        )


def given_file(folder: Path, name: str, content: bytes) -> list[Any]:
    return training(folder, base(folder), put(folder, name, content))


def two_files(folder: Path) -> list[Any]:
    put(folder, "data/b.csv", test_files.FORMS["csv"]([ROW]))
    return training(folder, base(folder), put(folder, "data/a.json", test_files.FORMS["json"]([ROW])).parent)


def packed_twice(folder: Path) -> list[Any]:
    put(folder, "data/a.json.gz", test_files.FORMS["json.gz"]([ROW]))
    return training(folder, base(folder), put(folder, "data/a.json", test_files.FORMS["json"]([ROW])).parent)


def thinking(folder: Path, template: str) -> list[Any]:
    row = {"instruction": "Say sun", "output": "<think>\nhm\n</think>\n\n  sun\n"}
    return training(folder, base(folder, template), rows(folder, row))


def chat_rows(folder: Path, row: Any) -> list[Any]:
    model = save_checkpoint(folder / "model", make_tokenizer("<|im_end|>"), make_model())
    return training(folder, model, rows(folder, row))


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def archive(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "rows.zip", "w") as file:
        file.writestr("rows.json", "[]")
    return folder / "rows.zip"


def checkpoint_cases() -> Iterator[Case]:
    for name, (damage, words) in test_base_model.BROKEN.items():
        for script in (train_lora, inference):

            def flags(folder: Path, damage: Callable[[Path], Any] = damage, script: Any = script) -> list[Any]:
                model = base(folder)
                damage(model)
                if script is train_lora:
                    return training(folder, model, rows(folder, ROW))
                return ["--model_path", model, "--instruction", "a"]

            yield Case(name + (", in inference" if script is inference else ""), script, flags, words)
    yield Case("FP8", train_lora, fp8, ["trained in "], 0)
    for method in ("gptq", "awq", "compressed-tensors"):
        yield Case(method, train_lora, lambda f, m=method: quantised(f, m), ["pip install"])
        yield Case(
            f"{method}, `--load_in_4bit`",
            train_lora,
            lambda f, m=method: [*quantised(f, m), "--load_in_4bit", True],
            ["already quantised"],
        )
    sizes = {"hidden_size": 64, "head_dim": 16}
    yield Case(
        "`--load_in_4bit`",
        train_lora,
        lambda f: [*training(f, base(f, **sizes), rows(f, ROW)), "--load_in_4bit", True],
        ["4-bit weights: "],
        0,
    )
    moe = {"model_type": "qwen3_moe", "moe_intermediate_size": 64} | sizes
    yield Case(
        "mixture of experts, `--load_in_4bit`",
        train_lora,
        lambda f: [*training(f, base(f, **moe), rows(f, ROW)), "--load_in_4bit", True],
        ["most weights stay in 16 or 32 bits"],
        0,
    )
    words = ["of Qwen3_5ForConditionalGeneration only the text part is loaded"]
    yield Case("Qwen3.5, text and vision", train_lora, vision, words, 0)
    yield Case(
        "a folder that does not exist",
        train_lora,
        lambda f: training(f, f / "no/such/model", rows(f, ROW)),
        ["does not exist", "--model_path"],
    )


def fp8(folder: Path) -> list[Any]:
    model = base(folder)
    test_base_model.change_weights(model, test_base_model.to_fp8)
    test_base_model.change_config(model, quantization_config=test_base_model.FP8)
    return training(folder, model, rows(folder, ROW))


def quantised(folder: Path, method: str) -> list[Any]:
    model = base(folder)
    config = {"quant_method": method, "bits": 4, "config_groups": {}}
    test_base_model.change_config(model, quantization_config=config)
    return training(folder, model, rows(folder, ROW))


def adapter_cases() -> Iterator[Case]:
    yield Case("its base model has moved", inference, moved, ["the base model of 'out'", "--model_path"])
    yield Case("its weights under other names", inference, renamed, ["does not fit this base model"])
    yield Case(
        "another base model of the same shape",
        inference,
        lambda f: [*asking(f, adapter(f)), "--model_path", base(f / "other", seed=1)],
        ["another base model", "other weights"],
    )
    yield Case("no adapter folder", inference, lambda f: asking(f, f / "no"), ["does not exist"])
    for flag, value in (("--max_length", 99), ("--seed", 1), ("--learning_rate", 1e-5)):
        yield Case(f"resumed with another `{flag}`", train_lora, lambda f, a=flag, b=value: resumed(f, a, b), [flag])
    yield Case(
        "`--push_to_hub` without a network",
        train_lora,
        lambda f: [*training(f, base(f), rows(f, ROW)), "--push_to_hub", True],
        ["cannot be created", "hf upload"],
    )
    words = [ROW | {"output": f"w{n}"} for n in range(201)] * 3
    yield Case("201 label words", train_lora, lambda f: many_words(f, words), ["at most 200 of a task"], 0)
    yield Case(
        "201 label words, `--labels auto`",
        inference,
        lambda f: asking(f, adapter(f, data=words), "--instruction", "a", "--labels", "auto"),
        ["201 label words", "name the words"],
    )
    spaces = [ROW | {"output": word} for word in ("正面", "正面 ", "负面")] * 3
    yield Case("`正面 ` beside `正面`", train_lora, lambda f: many_words(f, spaces), ["'正面' and '正面 '"], 0)
    comma = """["a, b", "c"]"""
    yield Case(
        f"`--labels '{comma}'`",
        inference,
        lambda f: asking(f, adapter(f), "--instruction", "a", "--labels", comma),
        ["a, b\t"],
        0,
    )
    yield Case("scores that are there already", inference, scored, ["metrics.json' already exists"])


def many_words(folder: Path, data: list[Any]) -> list[Any]:
    return training(folder, base(folder), rows(folder, *data))


def moved(folder: Path) -> list[Any]:
    out = adapter(folder)
    shutil.move(folder / "model", folder / "elsewhere")
    return asking(folder, out)


def renamed(folder: Path) -> list[Any]:
    out, file = adapter(folder), folder / "out/adapter_model.safetensors"
    state = test_base_model.load_file(file)
    test_base_model.save_file({name.replace("model.layers", "model.blocks"): state[name] for name in state}, file)
    return asking(folder, out)


def resumed(folder: Path, flag: str, value: Any) -> list[Any]:
    adapter(folder, "--keep_checkpoints", True)
    more = ["--resume_from_checkpoint", True, flag, value]
    return training(folder, folder / "model", folder / "rows.json", *more)


def scored(folder: Path) -> list[Any]:
    out = adapter(folder)
    put(folder, "answers.metrics.json", b"{}")
    return asking(folder, out, "--data_path", folder / "rows.json", "--output_file", folder / "answers.jsonl")


def place_cases() -> Iterator[Case]:
    yield Case(
        "`--output_dir` inside a file",
        train_lora,
        lambda f: [*training(f, base(f), rows(f, ROW)), "--output_dir", put(f, "file", b"") / "out"],
        ["cannot be written"],
    )
    yield Case(
        "`--output_dir` that holds an adapter",
        train_lora,
        lambda f: training(f, base(f), f / adapter(f / "x").parent / "rows.json", "--output_dir", f / "x/out"),
        ["already holds an adapter"],
    )
    yield Case(
        "bytes that are not UTF-8 in `--instruction`",
        inference,
        lambda f: asking(f, adapter(f), "--instruction", "a\udcff"),
        ["not UTF-8"],
    )
    yield Case(
        "a GBK file",
        train_lora,
        lambda f: training(f, base(f), put(f, "rows.json", '[{"instruction": "你好"}]'.encode("gbk"))),
        ["not UTF-8 (GBK, perhaps?)", "iconv -f GB18030"],
    )


def vision(folder: Path) -> list[Any]:
    return training(folder, Path(test_folder.save_whole_class(folder / "model")), rows(folder, ROW))


GROUPS = {
    "Rows (traps 53, 54, 58, 59, 71)": rows_cases,
    "Checkpoints (traps 51, 52, 56, 60, 68, 69, 73)": checkpoint_cases,
    "Adapters and their use (traps 10, 55, 61, 62, 63, 72, 74)": adapter_cases,
    "Places (traps 67, 70)": place_cases,
}
OTHERS = (57, 64, 65, 66, 75, 76, 77)  # traps that no single command shows


def make_table() -> str:
    lines = ["# Inputs", "", *__doc__.split("\n\n")[0].splitlines(), "`python tests/inputs.py` makes this table."]
    for title, cases in GROUPS.items():
        lines += ["", f"## {title}", "", "| input | command | exit | line |", "|---|---|--:|---|"]
        for case in cases():
            shown = check(case).replace("|", "\\|").replace("\t", " ")
            lines.append(
                f"| {case.what.replace('|', chr(92) + '|')} | {case.script.__name__} | {case.code} | {shown} |"
            )
    lines += [
        "",
        "## What no single command shows, and its tests",
        "",
        "| trap | what goes wrong | tests |",
        "|---|---|---|",
    ]
    table = (REPOSITORY / "tests/README.md").read_text(encoding="utf-8")
    lines += [row for row in table.splitlines() if row.startswith(tuple(f"| {number} |" for number in OTHERS))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(make_table(), encoding="utf-8")
