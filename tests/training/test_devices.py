"""Devices that this machine lacks, as they would describe themselves: attention, precision, flags and files."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support import make_model, make_rows, make_soft
from transformers import AutoConfig, TrainingArguments
from transformers.integrations import liger

import common
import train_lora
from finetuning.cli.arguments import ModelArguments
from finetuning.model import folder
from finetuning.training import flags
from finetuning.training import trainer as trainer_module
from finetuning.training.flags import Arguments, parse_arguments

VARLEN, ROWS, REPEATED = "varlen_attn, all rows at once", "SDPA without a mask\n", "keys and values repeated"


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`parse_arguments` sets a variable of the environment: it goes again after the test."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that makes PyTorch describe GPUs of a compute capability."""

    def fake(capability: tuple[int, int], count: int = 1) -> None:
        def has_bf16(including_emulation: bool = True) -> bool:
            return including_emulation or capability >= (8, 0)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        device = property(lambda self: torch.device("cpu" if self.use_cpu else "cuda:0"))
        monkeypatch.setattr(TrainingArguments, "_setup_devices", device)
        monkeypatch.setattr(TrainingArguments, "_n_gpu", count, raising=False)
        monkeypatch.setattr(flags, "try_out", Mock())  # which would need the GPU

    return fake


def parse(*words: str) -> Arguments:
    return parse_arguments(train_lora.LoraArguments, None, ["--output_dir", "out", *words])


@pytest.mark.parametrize(
    ("capability", "words", "line", "attention"),
    [
        ((7, 5), "", "precision   float16\n", REPEATED),  # trap 80: no advice that this GPU cannot follow
        ((8, 0), "", "float16; --bf16 True is safer", VARLEN),
        ((9, 0), "", "float16; --bf16 True is safer", VARLEN),
        ((12, 0), "--bf16 True", "precision   bfloat16\n", VARLEN),
        ((9, 0), "--fp16 False", "precision   float32\n", REPEATED),
        ((9, 0), "--use_cpu True", "float32 (on the CPU, as --use_cpu says", ROWS),
    ],
)
def test_gpus(
    fake_gpu: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    words: str,
    line: str,
    attention: str,
) -> None:
    """What a run prints in its first lines, and what it passes on to the Trainer."""
    fake_gpu(capability)
    args = parse(*words.split()).training
    monkeypatch.setattr(trainer_module, "FineTuningTrainer", Mock())
    trainer_module.make_trainer(make_soft(), 0, args, None)
    printed = capsys.readouterr().out
    assert line in printed and attention in printed
    on_cuda = not args.use_cpu
    assert args.accelerator_config.non_blocking == args.dataloader_pin_memory == on_cuda
    assert args.fp16 == (words == "") and args.bf16 == ("bf16" in words)


def test_hybrids_name_their_slow_path(
    fake_gpu: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before step 1, and only where it matters: on a GPU."""
    monkeypatch.setattr(trainer_module, "FineTuningTrainer", Mock())
    printed = []
    for on_gpu in (False, True):
        if on_gpu:
            fake_gpu((9, 0))
        trainer_module.make_trainer(make_soft("qwen3_5_text"), 0, parse().training, None)
        printed.append(capsys.readouterr().out)
    assert "slow path" not in printed[0] and "padded rows" in printed[1]
    assert "pip install flash-linear-attention causal-conv1d" in printed[1]


def test_emulated_bfloat16_is_refused(fake_gpu: object, capsys: pytest.CaptureFixture[str]) -> None:
    fake_gpu((7, 5))
    with pytest.raises(SystemExit) as stop:
        parse("--bf16", "True")
    assert stop.value.code == 2 and "this GPU has no bfloat16" in capsys.readouterr().err
    assert not parse("--bf16", "True", "--use_cpu", "True").training.bf16  # where it means nothing


def test_several_gpus(fake_gpu: object, capsys: pytest.CaptureFixture[str]) -> None:
    fake_gpu((9, 0), count=4)
    assert parse().training.n_gpu == 1
    assert "several GPUs but one process" in capsys.readouterr().out


def test_a_mac(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("mps"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 1, raising=False)
    monkeypatch.setattr(flags, "try_out", Mock())
    monkeypatch.setattr(trainer_module, "FineTuningTrainer", Mock())
    monkeypatch.setattr(sys, "platform", "darwin")
    parsed = parse()
    args = parsed.training
    trainer_module.make_trainer(make_soft(), 0, args, None)
    printed = capsys.readouterr().out
    assert "float32, on the GPU of this Mac" in printed and ROWS in printed
    assert not (args.fp16 or args.bf16 or args.dataloader_pin_memory or args.accelerator_config.non_blocking)
    assert parsed.dtype == torch.float32


def test_another_family(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, on padded rows, and the run says so."""
    monkeypatch.setattr(trainer_module, "FineTuningTrainer", Mock())
    for model_type, words in (("llama", "llama was not tried here"), ("qwen3", "")):
        trainer_module.make_trainer(Mock(config=AutoConfig.for_model(model_type)), 0, parse().training, None)
        printed = capsys.readouterr().out
        assert words in printed and ("and full_attention is" in printed) == bool(words)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_expandable_segments(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Set before CUDA starts, unless the user chose, and not on Windows, which has none and would warn."""
    monkeypatch.setattr(sys, "platform", platform)
    parse()
    expected = "expandable_segments:True" if platform == "linux" else None
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    parse()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_files_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's files are flushed to the disk; its folder, which Windows cannot open, is left alone."""
    flushed = []
    (tmp_path / "adapter.safetensors").write_bytes(b"1")
    windows = SimpleNamespace(name="nt", fsync=flushed.append, open=Mock(side_effect=PermissionError))
    monkeypatch.setattr(folder, "os", windows)
    folder.flush_to_disk(tmp_path)
    assert len(flushed) == 1


def test_cudnn_attention_is_off(base_path: str) -> None:
    """Trap 78: it would plan anew for every length of row."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.load_model(ModelArguments(model_path=base_path), torch.float32, torch.device("cpu"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_liger_without_its_losses(fake_gpu: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its losses would replace ours, and want all logits. A stand-in takes what the Trainer hands on."""
    stub, package = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel")
    stub._apply_liger_kernel_to_instance = Mock()
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stub)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(flags, "find_spec", lambda name: True)
    config = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    model = make_soft()
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config=config, max_steps=1
    )
    args.remove_unused_columns, args.eval_strategy, args.eval_steps = False, "steps", 1
    trainer = trainer_module.make_trainer(model, 0, args, make_rows(), make_rows())
    trainer.train()
    call = stub._apply_liger_kernel_to_instance.call_args
    assert call.kwargs == {"model": model.get_base_model(), **config}
    assert any("eval_loss" in entry for entry in trainer.state.log_history)  # with `skip_logits` among the inputs
    fake_gpu((9, 0))
    assert parse("--use_liger_kernel", "True").training.liger_kernel_config == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ('--activation_checkpointing_kwargs {"every_n_layers":2}', "add --gradient_checkpointing True"),
        ('--gradient_checkpointing True --activation_checkpointing_kwargs {"offload":true}', "needs a GPU"),
    ],
)
def test_checkpointing_that_would_do_nothing(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("method", [make_model, make_soft])
def test_every_second_layer_is_checkpointed(method: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`every_n_layers`: the same loss and gradients, and every second layer runs twice."""
    results = []
    for words in (
        [],
        ["--gradient_checkpointing", "True", "--activation_checkpointing_kwargs", '{"every_n_layers": 2}'],
    ):
        model, runs = method(), []
        for parameter in model.get_output_embeddings().parameters():
            parameter.requires_grad = False
        base = model.get_base_model() if method is make_soft else model
        for number, layer in enumerate(base.model.layers):
            layer.self_attn.register_forward_pre_hook(lambda *args, number=number, runs=runs: runs.append(number))
        args = parse("--output_dir", str(tmp_path), "--max_steps", "1", "--save_strategy", "no", *words).training
        trainer = trainer_module.make_trainer(model, 0, args, make_rows())
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"], sorted(runs)))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    assert results[0][2] == [0, 1] and results[1][2] == [0, 0, 1]
