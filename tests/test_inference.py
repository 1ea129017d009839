"""inference.py: a saved adapter answers as it was trained, or says why it cannot."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CHATML, IM_END, REPOSITORY, THINKERS, Force, Run, make_model, make_tokenizer, save_checkpoint

import inference
import train_lora
from common import load_model, load_tokenizer
from finetuning.cli.arguments import ModelArguments
from finetuning.generation import evaluate
from finetuning.generation.generate import encode_question
from finetuning.model.fingerprint import base_fingerprint, compare_fingerprints
from finetuning.model.folder import WEIGHTS, load_adapter, read_adapter


def train(monkeypatch: pytest.MonkeyPatch, model_path: str, rows_path: str, out: Path, *flags: object) -> str:
    words = f"--model_path {model_path} --data_path {rows_path} --output_dir {out} --max_steps 2 --disable_tqdm True"
    monkeypatch.setattr("sys.argv", ["train_lora.py", *words.split(), *map(str, flags)])
    train_lora.main()
    return str(out)


@pytest.fixture
def adapter_path(trained: Callable[..., Path]) -> str:
    return str(trained(train_lora, "--learning_rate", 0.05))


@pytest.fixture
def run(run_main: Run) -> Run:
    return partial(run_main, inference, "--max_new_tokens", 8)


def test_one_instruction(run: Run, adapter_path: str) -> None:
    """The base model is the one that the adapter names."""
    printed = run("--adapter_path", adapter_path, "--instruction", "Say sun")
    assert len(printed) > 1  # the answer, and nothing but the answer
    assert "Output" not in printed and "prompt" not in printed
    assert run("--adapter_path", adapter_path, "--instruction", "Say sun") == printed


def test_exact_prompt_can_be_shown(
    run: Run, adapter_path: str, rows_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr: stdout gets the answer alone."""
    answer = run("--adapter_path", adapter_path, "--instruction", "Say sun")
    flags = ["--adapter_path", adapter_path, "--max_new_tokens", "8", "--show_prompt", "True"]
    for words in (["--instruction", "Say sun"], ["--data_path", rows_path]):
        monkeypatch.setattr("sys.argv", ["inference.py", *flags, *words])
        inference.main()
        captured = capsys.readouterr()
        ids = list(b"Instruction: Say sun")
        assert f"prompt, 20 tokens: 'Instruction: Say sun'\nids: {ids}\n" in captured.err
        assert "ids:" not in captured.out and (captured.out == answer or "--data_path" in words)
    assert "--show_prompt" in run("--interactive", True, "--show_prompt", True, expected=2)


def test_batches_answer_as_single_rows(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    outputs = []
    for batch_size in (1, 5, 16):
        file = tmp_path / "new" / f"{batch_size}.jsonl"
        flags = ["--adapter_path", adapter_path, "--data_path", rows_path, "--output_file", file]
        printed = run(*flags, "--batch_size", batch_size)
        outputs.append([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        assert "| rows |   12 |" in printed
    rows = json.loads(Path(rows_path).read_text(encoding="utf-8"))
    assert [{name: row[name] for name in rows[0]} for row in outputs[0]] == rows  # in the file's order
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({row["prediction"] for row in outputs[0]}) > 1


def test_checkpointing_and_dropout_are_off(adapter_path: str, base_path: str) -> None:
    """Trap 16."""
    model, *_ = inference.load_for_inference(ModelArguments(model_path=None, load_in_4bit=None), adapter_path)
    assert not any(module.training for module in model.modules())
    assert not model.get_base_model().is_gradient_checkpointing


DTYPES = {
    "a CPU": (("cpu", "bfloat16", "bfloat16", False), torch.float32),
    "an adapter keeps float16": (("cuda", "bfloat16", "float16", True), torch.float16),
    "an adapter keeps bfloat16": (("cuda", "float16", "bfloat16", False), torch.bfloat16),
    "an adapter of a CPU": (("cuda", "bfloat16", "float32", True), torch.bfloat16),
    "no adapter": (("cuda", "bfloat16", None, True), torch.bfloat16),
    "no bfloat16": (("cuda", "bfloat16", None, False), torch.float16),
    "a float16 checkpoint": (("cuda", "float16", None, True), torch.float16),
    "an unknown checkpoint": (("cuda", None, None, True), torch.float16),
}


@pytest.mark.parametrize(("given", "dtype"), DTYPES.values(), ids=DTYPES)
def test_half_precision(given: tuple, dtype: torch.dtype) -> None:
    """Qwen is trained in bfloat16, and overflows float16."""
    assert inference.inference_dtype(*given) == dtype


@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"text_config": {}}, {}])
@pytest.mark.parametrize("emulated", [False, True])
def test_a_bare_model_on_a_gpu(
    config: dict[str, Any], emulated: bool, base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 if its config.json names it, perhaps of its text part, and the GPU does not only emulate it."""
    folder = Path(shutil.copytree(base_path, tmp_path / "model"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {name: value for name, value in content.items() if "dtype" not in name} | config
    if "text_config" in config:
        content["text_config"] = {"model_type": content["model_type"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    loader = Mock(return_value=make_model())
    monkeypatch.setattr(inference, "load_model", loader)
    inference.load_for_inference(ModelArguments(str(folder)), None)
    _, dtype, device = loader.call_args.args
    assert dtype == (torch.bfloat16 if config and not emulated else torch.float16) and device.type == "cuda"


# ---- traps 10, 35, 36, 42: the wrong adapter, the wrong base


def test_other_bases_are_refused(run: Run, adapter_path: str, tmp_path: Path) -> None:
    """Traps 10 and 94: all of these load in PEFT without a word; the last two have the same weights."""
    others = {
        "other weights": make_model(seed=1),
        "model_type": make_model("qwen3", attention_bias=True),
        "num_hidden_layers is 3, and was 2": make_model(num_hidden_layers=3),
        "rope_parameters is {'rope_theta': 500.0": make_model(rope_parameters={"rope_theta": 500.0}),
        "rms_norm_eps is 0.001, and was 1e-06": make_model(rms_norm_eps=1e-3),
    }
    for number, (words, model) in enumerate(others.items()):
        path = save_checkpoint(tmp_path / str(number), make_tokenizer(), model)
        message = run("--adapter_path", adapter_path, "--model_path", path, "--instruction", "a", expected=2)
        assert words in message and "--model_path" in message
    fine_tuned = make_model()
    fine_tuned.model.layers[1].input_layernorm.weight.data += 0.01  # same embeddings, as an instruct version has
    path = save_checkpoint(tmp_path / "close", make_tokenizer(), fine_tuned)
    assert "other weights" in run(
        "--adapter_path", adapter_path, "--model_path", path, "--instruction", "a", expected=2
    )


def test_a_base_that_computes_the_same_is_accepted() -> None:
    """Another context length or use of the cache; another version of transformers; an adapter of before."""
    model = make_model()
    saved = base_fingerprint(model)
    for name, value in {"max_position_embeddings": 4096, "use_cache": False, "initializer_range": 1.0}.items():
        setattr(model.config, name, value)
    assert compare_fingerprints(saved, base_fingerprint(model)) is None
    assert compare_fingerprints(saved | {"config": saved["config"] | {"a_new_field": 1}}, saved) is None
    older = {name: value for name, value in saved.items() if name != "config"}  # it knows a few sizes
    assert compare_fingerprints(older | {"sizes": {"hidden_size": 32, "vocab_size": 264}}, saved) is None
    assert compare_fingerprints(older | {"sizes": {"hidden_size": 64}}, saved) == "hidden_size is 32, and was 64"


def test_same_base_in_another_dtype_is_accepted() -> None:
    """Trained in half precision on a GPU, used in float32 on a CPU."""
    model = make_model().to(torch.bfloat16)  # as Qwen's checkpoints are stored
    prints = [base_fingerprint(model.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    assert all(compare_fingerprints(saved, found) is None for saved in prints for found in prints)
    other = base_fingerprint(make_model(seed=1))
    assert all(compare_fingerprints(saved, other) for saved in prints)


def test_every_kind_of_matrix_is_compared(tmp_path: Path) -> None:
    """Trap 10: models with equal embeddings and norms; 4-bit weights are still known."""
    model = make_model(hidden_size=64, head_dim=16)
    saved, path = base_fingerprint(model), save_checkpoint(tmp_path / "model", make_tokenizer(), model)
    for in_4bit in (False, True):
        loaded = load_model(ModelArguments(path, in_4bit), torch.float32, torch.device("cpu"))
        assert compare_fingerprints(saved, base_fingerprint(loaded)) is None
    for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            if kind in name and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        assert compare_fingerprints(saved, base_fingerprint(other)) == f"it has other weights in {kind}"
    for model_type in ("qwen3_moe", "qwen3_next", "qwen3_5_text"):
        one, other = (make_model(model_type, seed) for seed in (0, 1))
        other.model.embed_tokens = one.model.embed_tokens
        assert "other weights" in compare_fingerprints(base_fingerprint(one), base_fingerprint(other))


def test_other_quantisation_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows_path: str, tmp_path: Path
) -> None:
    model = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    adapter = train(monkeypatch, model, rows_path, tmp_path / "out", "--load_in_4bit", True)
    for flags, warned in (([], False), (["--load_in_4bit", "False"], True), (["--load_in_4bit", "True"], False)):
        words = ["inference.py", "--adapter_path", adapter, "--instruction", "a", "--max_new_tokens", "2", *flags]
        monkeypatch.setattr("sys.argv", words)
        capsys.readouterr()
        inference.main()
        assert ("was trained on a base model in 4-bit" in capsys.readouterr().err) == warned


def copy_adapter(adapter_path: str, folder: Path) -> Path:
    folder.mkdir()
    for path in Path(adapter_path).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_incomplete_adapter(run: Run, adapter_path: str, tmp_path: Path, missing: str) -> None:
    folder = copy_adapter(adapter_path, tmp_path / "copy")
    (folder / missing).unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle, which is never opened")  # trap 42
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert str(folder) in message and missing in message


def test_an_adapter_that_somebody_sends_you(run: Run, adapter_path: str, base_path: str, tmp_path: Path) -> None:
    """It cannot import code, its template runs in a sandbox, and its base model is not read from pickle."""
    folder = copy_adapter(adapter_path, tmp_path / "copy")
    config, info = (
        json.loads((folder / f"adapter_{name}.json").read_text(encoding="utf-8")) for name in ("config", "info")
    )

    def ask(expected: int = 2, **files: str) -> str:
        for name, text in files.items():
            (folder / name.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(text, encoding="utf-8")
        return run("--adapter_path", folder, "--instruction", "a", expected=expected)

    message = ask(adapter_config_json=json.dumps(config | {"megatron_config": {"a": 1}, "megatron_core": "os"}))
    assert "LORA and PROMPT_TUNING are loaded" in message
    assert "kind IA3" in ask(adapter_config_json=json.dumps(config | {"peft_type": "IA3"}))
    assert "holds no object" in ask(adapter_config_json="[]")
    assert "does not fit" in ask(adapter_config_json=json.dumps(config | {"r": "x"}))
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "holds no object" in ask(adapter_info_json="null")
    assert "no base_fingerprint" in ask(
        adapter_info_json=json.dumps({k: info[k] for k in info if k != "base_fingerprint"})
    )
    (folder / "adapter_info.json").write_text(json.dumps(info), encoding="utf-8")
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    assert "cannot be rendered" in ask(chat_template_jinja=escape)
    pickled = tmp_path / "pickled"
    shutil.copytree(base_path, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    message = run("--model_path", pickled, "--instruction", "a", expected=2)
    assert "safetensors" in message


def test_what_is_no_adapter(run: Run, adapter_path: str, base_path: str, tmp_path: Path) -> None:
    """Trap 104: a whole model, a pickle, a folder of adapters, one without its base, one of the hub."""

    def ask(path: Any) -> str:
        return run("--adapter_path", path, "--instruction", "a", expected=2)

    assert f"it is a whole model: ask it with --model_path {base_path}" in ask(base_path)
    folder = copy_adapter(adapter_path, tmp_path / "run")
    assert f"perhaps you mean --adapter_path {folder}" in ask(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickled weights (.bin)" in ask(folder)
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "does not say which base model it was trained on" in ask(folder)
    assert "cannot be downloaded" in ask("owner/name")


def test_an_adapter_on_the_hub(
    run: Run, adapter_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download = Mock(return_value=adapter_path)
    monkeypatch.setattr("finetuning.model.folder.snapshot_download", download)
    assert run("--adapter_path", "owner/name", "--instruction", "a") and download.call_args.args == ("owner/name",)


def test_missing_adapter_and_missing_base(run: Run, adapter_path: str, tmp_path: Path) -> None:
    """Traps 35 and 36: no look-up of a mistyped path on the hub."""
    assert "does not exist" in run("--adapter_path", tmp_path / "no", "--instruction", "a", expected=2)
    folder = copy_adapter(adapter_path, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(tmp_path / "moved" / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert f"the base model of '{folder}'" in message and "--model_path" in message and "moved" in message


def test_adapter_with_nan_or_of_another_shape(run: Run, adapter_path: str, tmp_path: Path) -> None:
    folder = copy_adapter(adapter_path, tmp_path / "nan")
    state = load_file(folder / "adapter_model.safetensors")
    name = next(iter(state))
    save_file(state | {name: state[name] * float("nan")}, folder / "adapter_model.safetensors")
    assert "NaN" in run("--adapter_path", folder, "--instruction", "a", expected=2)
    save_file(state | {name: state[name][:, :4].contiguous()}, folder / "adapter_model.safetensors")
    message = run("--adapter_path", folder, "--instruction", "a", expected=2)
    assert "does not fit" in message and "size mismatch" in message
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    assert "adapter_model.safetensors" in run("--adapter_path", folder, "--instruction", "a", expected=2)


def foreign_adapter(adapter_path: str, folder: Path) -> Path:
    """The adapter as other tools save it, without our files."""
    copy_adapter(adapter_path, folder)
    for name in ("adapter_info.json", "chat_template.jinja"):
        (folder / name).unlink()
    return folder


def read_prompt(base_path: str, adapter: Path, format_name: str | None = None) -> str:
    tokenizer = load_tokenizer(ModelArguments(base_path), format_name, str(adapter))
    return tokenizer.decode(encode_question({"instruction": "Say sun"}, tokenizer))


def test_the_template_of_another_tool(
    adapter_path: str, base_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 91: trained in ChatML on a base model; transformers 4 saves the template in tokenizer_config.json."""
    bare = foreign_adapter(adapter_path, tmp_path / "bare")
    in_config = foreign_adapter(adapter_path, tmp_path / "in_config")
    (in_config / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKERS["switch"]}))
    as_file = foreign_adapter(adapter_path, tmp_path / "as_file")
    (as_file / "chat_template.jinja").write_text(THINKERS["switch"])
    trained = "<|im_start|>user\nSay sun<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert read_prompt(base_path, in_config) == read_prompt(base_path, as_file) == trained
    assert read_prompt(base_path, bare) == "Instruction: Say sun"
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSay sun<|im_end|>\n<|im_start|>assistant\n"
    assert read_prompt(base_path, bare, "chat") == read_prompt(base_path, in_config, "chat") == chat
    assert read_prompt(base_path, in_config, "plain") == "Instruction: Say sun"
    (in_config / "tokenizer_config.json").write_text("{")
    with pytest.raises(SystemExit):
        read_prompt(base_path, in_config)
    assert "tokenizer_config.json that is not complete" in capsys.readouterr().err


def test_the_tokenizer_of_another_tool(run: Run, adapter_path: str, base_path: str, tmp_path: Path) -> None:
    """Trap 90: with a token of its own, in a spare row of the vocabulary, and with or without a template."""
    folder = foreign_adapter(adapter_path, tmp_path / "adapter")
    tokenizer = make_tokenizer(chat_template=THINKERS["switch"])
    tokenizer.add_tokens(["<happy>"])
    for template, start in ((THINKERS["switch"], "<|im_start|>user"), (None, "Instruction: ")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        loaded = load_tokenizer(ModelArguments(base_path), None, str(folder))
        prompt = encode_question({"instruction": "Say <happy>"}, loaded)
        assert 260 in prompt and loaded.decode(prompt).startswith(start)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert 260 not in encode_question({"instruction": "Say <happy>"}, load_tokenizer(ModelArguments(base_path), "auto"))
    flags = ["--adapter_path", folder, "--model_path", base_path, "--instruction", "Say <happy>"]
    assert run(*flags) and run(*flags, "--prompt_format", "chat")
    (folder / "tokenizer.json").write_text("{")
    assert f"'{folder}'" in run(*flags, expected=2)


def test_an_adapter_that_changes_nothing(adapter_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 95: sharded training that was saved wrongly leaves B at 0."""
    state = load_file(Path(adapter_path, WEIGHTS))
    for name, words in (("lora_B", "changes nothing"), ("lora_A", ""), ("none", "")):
        folder = copy_adapter(adapter_path, tmp_path / name)
        save_file({key: tensor * (name not in key) for key, tensor in state.items()}, folder / WEIGHTS)
        read_adapter(str(folder))
        assert (words in capsys.readouterr().err) if words else not capsys.readouterr().err


BAD_FLAGS = {
    "an input alone": (["--input", "a"], "add one, or leave --input out"),
    "an empty value": (["--data_path", "ROWS", "--labels", ""], "--labels is empty"),
    "a page over the answers": (
        ["--data_path", "ROWS", "--output_file", "a.jsonl", "--report", "./a.jsonl"],
        "name another",
    ),
    "a page over the scores": (
        ["--data_path", "ROWS", "--output_file", "a.jsonl", "--report", "a.metrics.json"],
        "is where the answers or their scores go",
    ),
    "two questions": (["--instruction", "a", "--data_path", "ROWS"], "--instruction and --data_path"),
    "chat and rows": (["--interactive", "True", "--data_path", "ROWS"], "--data_path and --interactive"),
    "chat and labels": (["--interactive", "True", "--labels", "a,b"], "--labels"),
    "output without rows": (["--output_file", "out.jsonl"], "--data_path"),
    "no batch": (["--batch_size", "0"], "--batch_size"),
    "no tokens": (["--max_new_tokens", "0"], "--max_new_tokens"),
    "unknown task": (["--data_path", "ROWS", "--tasks", "none"], "--tasks"),
    "temperature without sampling": (["--temperature", "0.7"], "--do_sample True"),
    "cold": (["--do_sample", "True", "--temperature", "0"], "--temperature"),
    "top_p": (["--do_sample", "True", "--top_p", "1.5"], "--top_p"),
    "one label": (["--instruction", "a", "--labels", "yes"], "two or more"),
    "a label twice": (["--instruction", "a", "--labels", "yes,no,yes"], "different"),
    "no known labels": (["--instruction", "a", "--labels", "auto"], "--labels 正面,负面"),
    "output in a file": (["--data_path", "ROWS", "--output_file", "ROWS/out.jsonl"], "cannot be written"),
}


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_mistakes(run: Run, adapter_path: str, rows_path: str, flags: list[str], words: str) -> None:
    flags = [flag.replace("ROWS", rows_path) for flag in flags]
    assert words in run("--adapter_path", adapter_path, *flags, expected=2)


def test_output_file_of_rows_with_half_a_surrogate_pair(run: Run, adapter_path: str, tmp_path: Path) -> None:
    """In a field that is ignored; an escape stands for it, as on the screen."""
    rows, out = tmp_path / "odd.json", tmp_path / "answers.jsonl"
    rows.write_text('[{"instruction": "a", "note": "\\ud83d"}]')
    run("--adapter_path", adapter_path, "--data_path", rows, "--output_file", out, "--max_new_tokens", 2)
    assert json.loads(out.read_text(encoding="utf-8"))["note"] == "\ud83d"


def test_output_file_is_not_replaced(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine", encoding="utf-8")
    message = run("--adapter_path", adapter_path, "--data_path", rows_path, "--output_file", taken, expected=2)
    assert "taken.jsonl" in message and taken.read_text(encoding="utf-8") == "mine"


def test_conversations_and_rows_without_answers(run: Run, adapter_path: str, tmp_path: Path) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"instruction": "a"}), encoding="utf-8")
    printed = run("--adapter_path", adapter_path, "--data_path", path)
    assert printed.count('"prediction"') == 2 and "exact match" not in printed


def test_answers_do_not_need_the_scorer(
    run: Run, adapter_path: str, rows_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract's pip command does not install sacrebleu."""
    monkeypatch.setattr("finetuning.generation.metrics.find_spec", lambda name: None)
    printed = run("--adapter_path", adapter_path, "--data_path", rows_path)
    assert printed.count('"prediction"') == 12 and "exact match" not in printed


def test_scores_are_not_overwritten(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    """Trap 61: each answer file has its own, also beside the adapter and the scores of its training."""
    flags = ["--adapter_path", adapter_path, "--data_path", rows_path, "--output_file"]
    for name in ("a.jsonl", "b.jsonl"):
        run(*flags, tmp_path / name)
    assert {path.name for path in tmp_path.glob("*.json")} == {"a.metrics.json", "b.metrics.json"}
    (tmp_path / "a.jsonl").unlink()
    assert "a.metrics.json' already exists" in run(*flags, tmp_path / "a.jsonl", expected=2)


ENCODINGS = ["ascii", "cp1252", "gbk"]


@pytest.fixture
def odd_rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text('[{"instruction": "翻译🙂", "output": "é"}]', encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_terminals_that_are_not_utf8(
    encoding: str, base_path: str, odd_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 66: what a terminal cannot show is shown as an escape, and never ends a run."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    train(monkeypatch, base_path, str(odd_rows), tmp_path / "out")
    terminal.flush()
    printed = terminal.buffer.getvalue()
    assert b"\\U0001f642" in printed and b"Try it:" in printed


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_terminals_of_a_process(encoding: str, base_path: str, odd_rows: Path, tmp_path: Path) -> None:
    """Trap 66, with the streams that Python opens."""
    words = f"--model_path {base_path} --data_path {odd_rows} --output_dir {tmp_path}/out --max_steps 1"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, str(REPOSITORY / "train_lora.py"), *words.split(), "--disable_tqdm", "True"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"\\U0001f642" in result.stdout and b"Try it:" in result.stdout


def test_bytes_that_are_not_utf8(run: Run, adapter_path: str) -> None:
    """Trap 67: as Python passes them on from the command line."""
    assert "not UTF-8" in run("--adapter_path", adapter_path, "--instruction", "a\udcff", expected=2)


def test_an_adapter_from_another_folder(
    run: Run, rows_path: str, base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 72: the base model's path is saved as an absolute one."""
    monkeypatch.chdir(Path(base_path).parent)
    out = train(monkeypatch, Path(base_path).name, rows_path, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert run("--adapter_path", out, "--instruction", "Say sun")


def test_cut_answers_are_counted(run: Run, adapter_path: str, rows_path: str, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    flags = ["--adapter_path", adapter_path, "--data_path", rows_path, "--output_file", file, "--max_new_tokens", 1]
    assert "12 rows answered, 12 of the answers cut" in run(*flags)
    assert all(json.loads(line)["cut"] for line in file.read_text(encoding="utf-8").splitlines())
    saved = json.loads((tmp_path / "out.metrics.json").read_text(encoding="utf-8"))
    assert saved["cut"] == saved["rows"] == saved["scores"]["rows"]["rows"] == 12


@pytest.mark.parametrize("template", ["switch", "ChatML"])
def test_thoughts(
    run_main: Run, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 58: asked in the mode that was trained; the thought is shown apart, and the answer is scored without it."""
    tokenizer = make_tokenizer("<|im_end|>", THINKERS.get(template, CHATML))
    model = save_checkpoint(tmp_path / "model", tokenizer, make_model())
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Go", "output": "<think>hm</think>ok"}] * 2), encoding="utf-8")
    flags = ["--thinking", "auto", "--eval_data_path", rows, "--eval_metrics", False]
    adapter = train(monkeypatch, model, str(rows), tmp_path / "out", *flags)
    saved = (tmp_path / "out/chat_template.jinja").read_text(encoding="utf-8")
    assert saved.startswith("{%- set enable_thinking = true %}") == (template == "switch")

    def think(model: torch.nn.Module, *rest: Any) -> torch.nn.Module:
        model = load_adapter(model, *rest)
        original = model.generate

        def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            kwargs["logits_processor"] = [Force(input_ids.shape[1], [*b"<think>\nhm\n</think>\n\nok", IM_END])]
            return original(input_ids=input_ids, **kwargs)

        model.generate = generate
        return model

    monkeypatch.setattr(inference, "load_adapter", think)
    run, flags = partial(run_main, inference), ["--adapter_path", adapter]
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["inference.py", *flags, "--instruction", "Go"])
    inference.main()
    shown = capsys.readouterr()
    assert shown.out == "ok\n" and "thought: hm\n" in shown.err
    file = tmp_path / "answers.jsonl"
    assert "| rows |    2 |      100.0% |" in run(*flags, "--data_path", rows, "--output_file", file)
    answer = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert (answer["prediction"], answer["thought"]) == ("ok", "hm")
    labels = [*flags, "--instruction", "Go", "--labels", "ok,no"]
    if template == "switch":
        assert run(*labels).count("\t") == 2
    else:
        assert "writes a thought" in run(*labels, expected=2)


# ---- an interrupted run resumes


def test_interrupted_file_goes_on(
    run: Run, adapter_path: str, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered rows are kept and not answered again; half a line is dropped."""
    flags = ["--adapter_path", adapter_path, "--data_path", rows_path, "--batch_size", 2, "--output_file"]
    run(*flags, tmp_path / "whole.jsonl")
    asked = []
    generate = evaluate.answer_in_batches

    def stop_after_three(model: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any) -> Any:
        asked.append(len(prompts))
        for number, batch in enumerate(generate(model, tokenizer, prompts, *rest)):
            if number == {1: 3, 2: 1}.get(len(asked)):
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(evaluate, "answer_in_batches", stop_after_three)
    out = tmp_path / "out.jsonl"
    assert "the same command resumes from here" in run(*flags, out, expected=130)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(partial.read_text(encoding="utf-8").splitlines()) == 1 + 6
    assert "max_new_tokens 8, not 9" in run(*flags, out, "--max_new_tokens", 9, expected=2)
    with open(partial, "ab") as file:
        file.write(b'{"row": 11, "predi')
    run(*flags, out, expected=130)  # once more: what follows half a line must stay readable
    assert "resuming after the 8 rows" in run(*flags, out)
    assert asked == [12, 6, 4] and not partial.exists()
    assert out.read_text(encoding="utf-8") == (tmp_path / "whole.jsonl").read_text(encoding="utf-8")


# ---- labels


def test_labels_of_an_instruction(run: Run, adapter_path: str) -> None:
    printed = run("--adapter_path", adapter_path, "--instruction", "Say sun", "--labels", "sun, rain，storm")
    labels, probabilities = zip(*(line.split("\t") for line in printed.splitlines()), strict=True)
    assert sorted(labels) == ["rain", "storm", "sun"]
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(map(float, probabilities)) == pytest.approx(1, abs=2e-4)


def test_labels_of_the_training_data(run: Run, base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--labels auto: each task's own words, saved beside the adapter; tasks with other answers have none."""
    words = {"weather": ["sun", "rain"], "mood": ["glad", "sad", "calm"]}
    rows = [
        {"instruction": f"What is {n}?", "output": own[n % len(own)], "task": task}
        for task, own in words.items()
        for n in range(10)
    ]
    rows += [{"instruction": f"Say {n}", "output": str(n), "task": "speech"} for n in range(5)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    out = train(monkeypatch, base_path, str(path), tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_info.json").read_text(encoding="utf-8"))["labels"] == words
    flags = ["--adapter_path", out, "--labels", "auto"]
    message = run(*flags, "--data_path", path, expected=2)
    assert "row 21 is of task 'speech'" in message and "--tasks weather,mood" in message
    file = tmp_path / "answers.jsonl"
    printed = run(*flags, "--data_path", path, "--tasks", "mood,weather", "--output_file", file)
    assert "| weather: right answer | sun | rain | (other) |" in printed
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [answer["task"] for answer in answers] == ["weather"] * 10 + ["mood"] * 10
    for answer in answers:
        assert answer["prediction"] in words[answer["task"]]
        assert set(answer["probabilities"]) == set(words[answer["task"]])
        assert answer["probabilities"][answer["prediction"]] == max(answer["probabilities"].values())
    assert "names no 'task'" in run(*flags, "--instruction", "How?", expected=2)
    assert len(run(*flags, "--instruction", "How?", "--tasks", "mood").splitlines()) == 3
