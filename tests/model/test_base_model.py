"""base_model.py: a checkpoint trains right or is refused in one line (traps 51, 52, 60, 68, 69, 73)."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import CHATML, REPOSITORY, STEP, Run, make_model, make_tokenizer, save_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

import inference
import train_lora
from common import load_model, load_tokenizer
from finetuning.cli.arguments import ModelArguments
from finetuning.merging.checkpoint_copy import Checkpoint
from finetuning.model import base_model
from finetuning.model.base_model import loading_report

IDS = torch.tensor([[*b"Instruction: Say sun\nOutput: sun"]])
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(base_path: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_path, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")


def loss(model: torch.nn.Module) -> float:
    return model(input_ids=IDS, labels=IDS).loss.item()


def to_fp8(weights: dict[str, torch.Tensor], block: int = 128) -> dict[str, torch.Tensor]:
    """Released FP8 checkpoints: float8 blocks of 128 x 128, each with a scale of its own, `weight_scale_inv`."""
    converted = {}
    for name, weight in weights.items():
        converted[name] = weight
        if "proj" in name and weight.ndim == 2:
            rows, columns = (-(-size // block) for size in weight.shape)
            scales = torch.zeros(rows, columns)
            scaled = weight.float().clone()
            for row in range(rows):
                for column in range(columns):
                    part = scaled[row * block : (row + 1) * block, column * block : (column + 1) * block]
                    scales[row, column] = part.abs().max() / 448
                    part /= scales[row, column]
            converted |= {name: scaled.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    return converted


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@pytest.mark.parametrize("half", [False, True])
def test_fp8_has_the_loss_of_the_original(folder: Path, half: bool) -> None:
    """Trap 51: read without their scales, FP8 weights are hundreds of times too large."""
    before = loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    change_weights(folder, lambda weights: to_fp8({k: v.half() if half else v for k, v in weights.items()}))
    change_config(folder, quantization_config=FP8)
    model = load_model(ModelArguments(model_path=str(folder)), torch.float32, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert loss(model) == pytest.approx(before, rel=0.02)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_fp8_tiny_qwen_trains_as_tiny_qwen(run_main: Run, tmp_path: Path) -> None:
    """Trap 51: the first loss of a run differs by less than 2%. Blocks of unequal sizes, which transformers 5.23 reads
    with the scales of other blocks, are refused."""
    tiny = REPOSITORY / "models/tiny-qwen"
    converted = Path(shutil.copytree(tiny, tmp_path / "fp8"))
    change_weights(converted, partial(to_fp8, block=32))
    change_config(converted, quantization_config=FP8 | {"weight_block_size": [32, 32]})
    assert sum(weight.dtype == torch.float8_e4m3fn for weight in load_file(converted / WEIGHTS).values()) == 4 * 7
    losses = []
    for path in (tiny, converted):
        printed = run_main(
            train_lora, "--model_path", path, "--output_dir", tmp_path / f"of {path.name}", "--max_steps", 1
        )
        losses.append(float(STEP.findall(printed)[0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    change_config(converted, quantization_config=FP8)
    message = run_main(train_lora, "--model_path", converted, "--output_dir", tmp_path / "refused", expected=2)
    assert "192 rows or columns are no multiple of 128" in message


def test_saved_4bit_equals_load_in_4bit(run_main: Run, rows_path: str, tmp_path: Path) -> None:
    """Trap 51: a checkpoint that bitsandbytes saved; asking for 4 bits once more changes nothing."""
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), make_model(hidden_size=64, head_dim=16))
    saved = tmp_path / "saved"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config.bnb_4bit_compute_dtype = torch.float32
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).save_pretrained(saved)
    make_tokenizer().save_pretrained(saved)
    logits = []
    for arguments in (ModelArguments(path, True), ModelArguments(str(saved)), ModelArguments(str(saved), True)):
        logits.append(load_model(arguments, torch.float32, CPU)(input_ids=IDS).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    words = f"--model_path {saved} --data_path {rows_path} --output_dir {tmp_path}/out --max_steps 2"
    assert "4-bit weights: 9" in run_main(train_lora, *words.split())
    assert run_main(inference, "--adapter_path", tmp_path / "out", "--instruction", "Say sun", "--max_new_tokens", 4)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_missing_package_is_named(run_main: Run, folder: Path, method: str) -> None:
    """Trap 51: these need packages of their own."""
    change_config(folder, quantization_config={"quant_method": method, "bits": 4, "config_groups": {}})
    message = run_main(inference, "--model_path", folder, "--instruction", "a", expected=2)
    assert "pip install" in message
    message = run_main(inference, "--model_path", folder, "--load_in_4bit", True, "--instruction", "a", expected=2)
    assert f"already quantised ({method})" in message


def test_moe_in_4bit_says_how_much_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 60: experts are 3-D parameters, which bitsandbytes leaves alone."""
    model = make_model("qwen3_moe", hidden_size=64, head_dim=16, moe_intermediate_size=64)
    path = save_checkpoint(tmp_path / "moe", make_tokenizer(), model)
    load_model(ModelArguments(path, True), torch.float32, CPU)
    printed = capsys.readouterr()
    share = float(printed.out.split("4-bit weights: ")[1].split("%")[0])
    assert 5 < share < 50 and "most weights stay in 16 or 32 bits" in printed.err


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def without_a_shard(folder: Path) -> None:
    write_index(folder, metadata={}, weight_map={"a": "model-00001-of-00002.safetensors"})
    (folder / WEIGHTS).unlink()


def write_index(folder: Path, **content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def without_metadata(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    write_index(folder, weight_map={NAME: "model-00001-of-00001.safetensors"})


def as_snapshot(folder: Path) -> None:
    snapshot = folder / "models--Qwen--Qwen3-0.6B/snapshots/0123"
    snapshot.mkdir(parents=True)
    (folder / "config.json").rename(snapshot / "config.json")


def with_more_tokens(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(8)])
    tokenizer.save_pretrained(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NAME = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing weight": (
        lambda folder: change_weights(folder, lambda w: {k: v for k, v in w.items() if k != NAME}),
        ["lacks weights of the model", NAME, "1 in all"],
    ),
    "unexpected weight": (
        lambda folder: change_weights(folder, lambda w: w | {"model.layers.9.x.weight": w[NAME].clone()}),
        ["weights that the model lacks", "model.layers.9.x.weight"],
    ),
    "other shape": (
        lambda folder: change_config(folder, intermediate_size=48),
        ["weights of other shapes", "mlp.down_proj.weight"],
    ),
    "half a file": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000]),
        ["not complete (5,000 bytes)", "download it again"],
    ),
    "pointer": (lambda folder: (folder / WEIGHTS).write_bytes(POINTER), ["Git LFS pointer", "git lfs pull"]),
    "lost shard": (without_a_shard, ["lacks model-00001-of-00002.safetensors"]),
    "a tokenizer that is no object": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        ["has a tokenizer_config.json that holds no JSON object"],
    ),
    "a size that is text": (
        lambda folder: change_config(folder, hidden_size="x"),
        ["cannot be loaded: Validation error"],
    ),
    "a token that is a number": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"extra_special_tokens": 5}'),
        ["the tokenizer cannot be loaded"],
    ),
    "index without metadata": (without_metadata, ["has a model.safetensors.index.json that is not complete"]),
    "index is a pointer": (
        lambda folder: (folder / "model.safetensors.index.json").write_bytes(POINTER),
        ["has a model.safetensors.index.json that is only a Git LFS pointer"],
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500]),
        ["has a tokenizer.json that is not complete (500 bytes); download it again"],
    ),
    "half a configuration": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2",'),
        ["has a config.json that is not complete (23 bytes)"],
    ),
    "cache of the hub": (as_snapshot, ["no config.json", "perhaps you mean '", "/snapshots/0123'"]),
    "more tokens than embeddings": (with_more_tokens, ["ids up to 267", "embeddings for 264"]),
    "no tokenizer": (without_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "pickle": (as_pickle, ["only pickled weights", "safetensors"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ["has no weights"]),
    "adapter": (as_adapter, ["is an adapter, not a base model", "--adapter_path"]),
    "vision model": (
        lambda folder: change_config(folder, model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"]),
        ["not a language model"],
    ),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded(run_main: Run, folder: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    """Traps 52, 68, 69, 73: in training and in inference, one or two lines that say what it is."""
    damage(folder)
    for script, flags in ((train_lora, ["--output_dir", folder / "out"]), (inference, ["--instruction", "a"])):
        message = run_main(script, "--model_path", folder, *flags, expected=2)
        assert str(folder) in message
        for word in words:
            assert word in message


def test_what_is_no_folder(run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 104: it is called what it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "qwen.gguf").write_bytes(b"GGUF")
    (tmp_path / "models").mkdir()
    for path, words in {
        tmp_path / "qwen.gguf": "is a GGUF file, made for llama.cpp",
        "~/models": f"write --model_path {tmp_path}/models",
        "https://huggingface.co/Qwen/Qwen3-8B/tree/main": "write --model_path Qwen/Qwen3-8B",
        "qwen2.5:7b": "or a hub name such as Qwen/",
    }.items():
        assert words in run_main(train_lora, "--model_path", path, "--output_dir", tmp_path / "out", expected=2)


def test_several_templates(folder: Path) -> None:
    """Trap 104: a list of named ones, of which transformers takes the default."""
    change_file = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ 1 }}"}]
    content = json.loads(change_file.read_text(encoding="utf-8")) | {"chat_template": templates}
    (folder / "chat_template.jinja").unlink()
    change_file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(ModelArguments(str(folder)), "chat").chat_template == CHATML


def test_a_proxy_that_lacks_a_package(run_main: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 102: also if the model is in the cache."""
    message = "Using SOCKS proxy, but the 'socksio' package is not installed: `pip install httpx[socks]`"
    monkeypatch.setattr(base_model.AutoTokenizer, "from_pretrained", Mock(side_effect=ImportError(message)))
    assert "httpx[socks]" in run_main(inference, "--model_path", folder, "--instruction", "a", expected=2)


def test_a_single_file_beside_an_index(folder: Path) -> None:
    """Trap 103: transformers loads the file, and so does merging."""
    write_index(folder, weight_map={"a": "model-00001-of-00002.safetensors"})
    load_model(ModelArguments(str(folder)), torch.float32, CPU)
    assert set(Checkpoint(str(folder)).files.values()) == {WEIGHTS}


def test_pickle_is_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a checkpoint of the hub has nothing else: it can run code."""
    load = Mock(side_effect=OSError("no file named model.safetensors"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(SystemExit):
        load_model(ModelArguments(str(folder)), torch.float32, CPU)
    assert load.call_args.kwargs["use_safetensors"] is True


def test_what_transformers_logs_while_loading(capsys: pytest.CaptureFixture[str]) -> None:
    """It is part of an error, and printed if there is none."""
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    handlers = logging.getLogger("transformers").handlers
    before = len(handlers)
    with loading_report():
        assert len(handlers) == before  # one goes and one comes: nothing is printed twice
        logger.warning("slow path")
    assert "slow path" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="see above\nno memory"), loading_report():
        logger.warning("no memory")
        raise RuntimeError("see above")
    assert not capsys.readouterr().err
