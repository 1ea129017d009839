"""benchmark.py: the table, its JSON, why a method failed, and a refusal to compare runs with different losses."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import REPOSITORY, Run
from transformers import AutoModelForCausalLM

import benchmark
from benchmarking.child import find_reason, run_child
from benchmarking.flags import BenchmarkArguments
from benchmarking.shapes import SHAPES, make_config, make_random_checkpoint
from benchmarking.table import METHODS, check_losses
from finetuning.cli.memory import peak_memory, reset_peak_memory, used_memory

CPU = torch.device("cpu")


@pytest.mark.slow
def test_table_and_json(tmp_path: Path) -> None:
    """Four of the methods on tiny-qwen; the flattened and the padded run have one loss."""
    words = "--warmup_steps 1 --steps 2 --methods full,lora,lora_stock,prompt_tuning_4bit"
    command = [sys.executable, "benchmark.py", *words.split(), "--output_dir", str(tmp_path / "out")]
    options = {"cwd": REPOSITORY, "env": os.environ | {"PYTHONUTF8": "1"}, "encoding": "utf-8"}
    result = subprocess.run(command, capture_output=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["model"] == "models/tiny-qwen" and saved["matrix_product_rate"] > 0
    results = saved["results"]
    assert list(results) == ["full", "lora", "lora_stock", "prompt_tuning_4bit"]
    total, adapter = results["full"]["trainable"], results["lora"]["trainable"]
    assert results["full"]["trainable_percent"] == 100 and adapter == 4 * 8 * (3 * 192 + 192 + 2 * 96)
    assert results["lora"]["trainable_percent"] == pytest.approx(100 * adapter / (total + adapter))
    assert results["prompt_tuning_4bit"]["trainable"] == 20 * 192
    assert results["prompt_tuning_4bit"]["precision"] == "nf4"
    for figures in results.values():
        assert len(figures["losses"]) == 3 and 0.5 < figures["losses"][0] < 9
        assert 0.3 < figures["peak_gib"] < 10 and figures["steps"] == 2
        assert 0 < figures["supervised_tokens"] < 0.6 * figures["tokens"]
    assert results["lora"]["losses"] == pytest.approx(results["lora_stock"]["losses"], abs=1e-4)
    assert results["lora"]["losses"][0] == pytest.approx(results["full"]["losses"][0], abs=1e-4)
    table = [re.sub(" +", " ", line) for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 6 and "| 1.00 |" in table[2] and "| LoRA, stock Trainer, padded | float32 |" in table[4]
    assert (tmp_path / "out/benchmark.png").read_bytes().startswith(b"\x89PNG")


PARAMETERS = {  # of the released models
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_released_models(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape))
    assert model.num_parameters() == PARAMETERS[shape]


def test_random_checkpoint_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES["qwen3-0.6b"], "vocab_size", 5000)
    args = BenchmarkArguments(sequence_length=12, batch_size=2, warmup_steps=1, steps=3, only="lora")
    make_random_checkpoint("qwen3-0.6b", 1, str(tmp_path))
    figures = benchmark.measure(args, str(tmp_path))
    assert figures["trainable"] == 8 * (3 * 1024 + (16 + 8 + 8) * 128)
    assert len(figures["losses"]) == 4 and 7 < figures["losses"][0] < 12
    assert figures["tokens"] == 3 * 2 * 12 and figures["supervised_tokens"] == 3 * 2 * 11  # all but a row's first


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2.5-7b"])  # with the vocabulary in one matrix, and in two
def test_random_weights_are_those_of_the_class(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes, dtype and spread; each layer has its own; the same every time."""
    small = {"vocab_size": 5000, "hidden_size": 512, "intermediate_size": 600, "num_attention_heads": 8}
    monkeypatch.setitem(SHAPES, shape, SHAPES[shape] | small)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        make_random_checkpoint(shape, 3, str(tmp_path / name))
    first, second = (
        {k: v for f in (tmp_path / n).glob("*.safetensors") for k, v in load_file(f).items()}
        for n in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    expected = AutoModelForCausalLM.from_config(make_config(shape, 3), dtype=torch.float32).state_dict()
    assert first.keys() == expected.keys() - ({"lm_head.weight"} if shape == "qwen3-0.6b" else set())
    for name, tensor in first.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        assert tensor.std(correction=0).item() == pytest.approx(
            expected[name].std(correction=0).item(), rel=0.05, abs=1e-7
        )
        assert tensor.mean().item() == pytest.approx(expected[name].mean().item(), abs=1e-3)
    layers = [first[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert not torch.equal(layers[0], layers[1]) and not torch.equal(layers[1], layers[2])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak of main memory")
def test_random_weights_do_not_need_the_memory_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers of 63 MB."""
    monkeypatch.setitem(SHAPES["qwen3-0.6b"], "vocab_size", 5000)
    with tempfile.TemporaryDirectory() as folder:
        reset_peak_memory(CPU)
        before = used_memory(CPU)
        make_random_checkpoint("qwen3-0.6b", 10, folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    assert size > 600 * 10**6 and peak_memory(CPU) - before < size / 2


PROGRESS = "\r 40%|####      | 8/20 [00:10<00:15,  1.20s/it]"
TRACEBACK = """Traceback (most recent call last):
  File "benchmark.py", line 1, in <module>
    train()
    ~~~~~^^
"""
ENDS = {
    "message": ("error: no memory\nTry, in this order: --a\n" + PROGRESS, 1, "no memory"),
    "exception": (f"Warning: a\n{TRACEBACK}ValueError: 1\n\n{TRACEBACK}KeyError: 'b'\n{PROGRESS}", 1, "KeyError: 'b'"),
    "nothing": (PROGRESS, 3, "it ended with exit code 3"),
    "segmentation fault": (f"{TRACEBACK}KeyError: 'b'", -11, "killed by signal 11 (SIGSEGV)"),
    "killed": ("", -9, "killed by signal 9 (SIGKILL; the system kills what takes too much memory)"),
}


@pytest.mark.parametrize(("stderr", "code", "reason"), ENDS.values(), ids=ENDS)
def test_reason_of_a_failure(stderr: str, code: int, reason: str) -> None:
    """Trap 76: a killed process says nothing, and the last thing others print may be a progress bar."""
    assert find_reason(code, stderr) == reason


def test_children() -> None:
    assert run_child(["-c", "print('loading'); print('{\"rate\": 1}')"]) == {"rate": 1}
    assert run_child(["-c", "import os; os.kill(os.getpid(), 9)"]).startswith("killed by signal 9")
    assert run_child(["-c", "1 / 0"]) == "ZeroDivisionError: division by zero"


FIGURES = {
    "precision": "float32",
    "losses": [3.0, 2.0],
    "trainable": 5,
    "trainable_percent": 0.1,
    "peak_gib": 1.5,
    "steps": 2,
    "seconds": 4.0,
    "cpu_seconds": 4.0,
    "tokens_per_second": 100,
    "supervised_tokens_per_second": 50,
    "operations_per_second": 5e9,
}


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the processes return, by method, instead of measuring; an exception is raised."""
    returned = {"machine": {"device": "an abacus", "torch": "2", "matrix_product_rate": 1e10}}

    def run(words: list[str]) -> Any:
        result = returned[words[words.index("--only") + 1]]
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(benchmark, "run_child", run)
    return returned


def test_what_is_measured_is_kept(run_main: Run, children: dict[str, Any], base_path: str, tmp_path: Path) -> None:
    """Trap 76: methods that fail, a benchmark that is stopped, and losses that differ lose nothing."""
    words = f"--model_path {base_path} --output_dir {tmp_path}/out --methods full,lora,lora_stock".split()
    children |= {"full": "killed by signal 9", "lora": FIGURES, "lora_stock": FIGURES}
    printed = run_main(benchmark, *words)
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["failures"] == {"full": "killed by signal 9"}
    assert saved["results"] == {"lora": FIGURES, "lora_stock": FIGURES}
    assert saved["device"] == "an abacus" and saved["model"] == base_path and saved["arguments"]["steps"] == 20
    assert "base on" not in printed and "on an abacus, 0.01 TFLOP/s" in printed and printed.count("| float32 |") == 2
    assert [path.name for path in (tmp_path / "out").glob("*")] == ["benchmark.json", "benchmark.png"]

    children |= {"full": FIGURES, "lora": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_main(benchmark, *words)
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["results"] == {"full": FIGURES}

    children |= {"lora": FIGURES, "lora_stock": FIGURES | {"losses": [3.0, 2.5]}}
    assert "cannot be compared" in run_main(benchmark, *words, expected=1)
    saved = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert saved["results"].keys() == {"full", "lora", "lora_stock"}


def test_nothing_could_be_measured(
    run_main: Run,
    children: dict[str, Any],
    base_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lack of memory (trap 65) comes with the flags of this script, whichever place it came from."""
    warnings = []
    monkeypatch.setattr(benchmark, "warn", warnings.append)
    words = f"--model_path {base_path} --output_dir {tmp_path}/out --methods full,lora".split()
    children |= {"full": "killed by signal 9", "lora": "out of memory while loading the model: 1 GiB"}
    assert run_main(benchmark, *words, expected=1) == "error: no method could be measured"
    assert warnings == [
        "full was not measured: killed by signal 9",
        "lora was not measured: out of memory while loading the model: 1 GiB\n"
        "Try, in this order: --gradient_checkpointing True; --batch_size 1",
    ]
    children["machine"] = "killed by signal 9"
    message = run_main(benchmark, *words, expected=1)
    assert message == "error: the speed of this machine could not be measured: killed by signal 9"
    children["weights"] = "OSError: [Errno 28] No space left on device"
    message = run_main(benchmark, *words, "--shape", "qwen2.5-7b", expected=1)
    assert message == f"error: the random weights could not be made: {children['weights']}"


@pytest.mark.slow
def test_a_shape(run_main: Run, tmp_path: Path) -> None:
    """The whole way: weights, machine and method, each in its process; the weights are gone at the end."""
    words = f"--shape qwen3-0.6b --layers 1 --sequence_length 8 --batch_size 1 --methods lora --output_dir {tmp_path}"
    printed = run_main(benchmark, *words.split(), "--warmup_steps", 1, "--steps", 1)
    assert "qwen3-0.6b on CPU" in printed and "| LoRA | float32 | 57,344 |" in re.sub(" +", " ", printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.png"]


def test_report(run_main: Run, children: dict[str, Any], base_path: str, tmp_path: Path) -> None:
    """The table takes the place of what stands between the marks, in a copy of docs/speed.md and its sister."""
    files = [tmp_path / name for name in ("speed.md", "speed_zh.md")]
    words = (
        f"--model_path {base_path} --output_dir {tmp_path}/out --methods lora --report {files[0]},{files[1]}".split()
    )
    children["lora"] = FIGURES
    originals = [(REPOSITORY / "docs" / file.name).read_text(encoding="utf-8") for file in files]
    texts = [re.sub("<!-- /?benchmark -->\n", "", text) for text in originals]
    start, end = "<!-- benchmark -->\n", "<!-- /benchmark -->\n"
    children["machine"] = AssertionError("measured before the report was looked at")
    for mistake in ("", start, end, end + start, (start + end) * 2):
        files[0].write_text(texts[0] + mistake, encoding="utf-8")
        assert f"--report '{files[0]}'" in run_main(benchmark, *words, expected=2)
    children["machine"] = {"device": "an \\1 abacus", "torch": "2", "matrix_product_rate": 1e10}
    for file, text in zip(files, texts, strict=True):
        file.write_text(f"{text}{start}old\n{end}the end\n", encoding="utf-8")
    for _ in range(2):  # the second time in place of the first table
        run_main(benchmark, *words)
        for file, text in zip(files, texts, strict=True):
            before, between, after = re.split(f"{start}|{end}", file.read_text(encoding="utf-8"))
            assert before == text and after == "the end\n" and between.count("| method |") == 1
            assert len({len(line) for line in between.splitlines() if line.startswith("|")}) == 1  # they line up
            assert between.startswith("\n") and "on an \\1 abacus" in between
            assert between.endswith("|\n\n") and "\n| LoRA | float32 | 5 |" in re.sub(" +", " ", between)


def losses(*values: float, precision: str = "float32") -> dict[str, object]:
    return {"losses": list(values), "precision": precision}


def test_runs_with_other_losses_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    check_losses({"lora": losses(3.0, 2.0), "lora_stock": losses(3.0, 2.00005), "full": losses(3.0, 1.0)})
    check_losses({"lora": losses(3.0, precision="float16"), "lora_trl": losses(3.01, precision="float16")})
    half = [losses(3.0, 2.5, 2.0, last, precision="bfloat16") for last in (1.5, 1.6)]  # trap 85: they drift apart
    check_losses(dict(zip(("prompt_tuning", "prompt_tuning_stock"), half, strict=True)))
    check_losses({"prompt_tuning": losses(4.0), "full": losses(3.0), "lora_4bit": losses(3.1, precision="nf4")})
    for bad in (
        {"lora": losses(3.0, 2.0), "lora_stock": losses(3.0, 2.001)},
        {"lora": losses(3.0), "lora_trl": losses(float("nan"))},
        {"lora": losses(3.0), "full": losses(3.1)},
        {"lora": losses(3, 2, 2, 2), "lora_stock": losses(3, 2, 2, 2.001)},
        {"lora": losses(3, 2, 2, precision="float16"), "lora_trl": losses(3, 2, 2.1, precision="float16")},
    ):
        with pytest.raises(SystemExit) as stop:
            check_losses(bad)
        assert stop.value.code == 1 and "cannot be compared" in capsys.readouterr().err


BAD_FLAGS = {
    "shape": (["--shape", "qwen9"], "qwen2.5-7b"),
    "method": (["--methods", "lora,dora"], "--methods dora"),
    "layers": (["--layers", "2"], "--shape"),
    "steps": (["--steps", "0"], "--steps"),
    "model": (["--model_path", "no/such/model"], "does not exist"),
}


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_mistakes(run_main: Run, flags: list[str], words: str) -> None:
    assert words in run_main(benchmark, *flags, expected=2)


def test_methods_are_the_five_of_the_table() -> None:
    assert list(METHODS) == ["full", "lora", "lora_4bit", "prompt_tuning", "prompt_tuning_4bit"]
