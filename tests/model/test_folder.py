"""folder.py: an adapter fits its base model, or is refused (traps 55 and 56)."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import make_model, make_soft, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from common import load_model
from finetuning.cli.arguments import ModelArguments
from finetuning.model.folder import load_adapter, read_adapter
from finetuning.model.multimodal import write_for_multimodal

IDS = torch.tensor([[*b"Instruction: Say sun"]])
WEIGHTS = "adapter_model.safetensors"


def save_random_lora(model: torch.nn.Module, folder: Path, target_modules: list[str] | str) -> torch.Tensor:
    """Save an adapter of random weights as PEFT does; returns the logits with it."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last complete checkpoint is named, not the newest folder, which a killed run may have left partial."""
    for step, complete in ((2, True), (4, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}/adapter_info.json").write_text("{}")
    with pytest.raises(SystemExit):
        read_adapter(str(tmp_path))
    assert capsys.readouterr().err.endswith(f"perhaps you mean --adapter_path {tmp_path}/checkpoint-4\n")


@pytest.mark.parametrize("change", ["renamed", "one less", "one more"])
def test_keys_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    """Trap 55: PEFT warns, and the bare base model answers."""
    save_random_lora(make_model(), tmp_path, ["q_proj", "v_proj"])
    state = load_file(tmp_path / WEIGHTS)
    name, weight = next(iter(state.items()))
    if change == "renamed":
        state = {key.replace("base_model.model.model", "base_model.model.transformer"): state[key] for key in state}
    elif change == "one less":
        del state[name]
    else:
        state[name.replace("layers.0", "layers.7")] = weight.clone()
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit) as stop:
        load_adapter(make_model(), str(tmp_path), {})
    assert stop.value.code == 2 and "does not fit this base model" in capsys.readouterr().err


def test_a_prompt_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 55, for prompt tuning."""
    make_soft().save_pretrained(tmp_path)
    save_file({"prompt": load_file(tmp_path / WEIGHTS)["prompt_embeddings"]}, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit) as stop:
        load_adapter(make_model(), str(tmp_path), {})
    assert stop.value.code == 2 and "prompt_embeddings" in capsys.readouterr().err


@pytest.fixture
def whole_class(tmp_path: Path) -> str:
    return save_whole_class(tmp_path / "model")


def save_whole_class(folder: Path) -> str:
    """A checkpoint as released since Qwen3.5: text, vision, and `mtp` weights that transformers ignores."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16}
    text = make_model("qwen3_5_text").config.to_dict()
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "target_modules", [["q_proj", "v_proj", "in_proj_qkv"], r".*language_model\.layers\.\d+\.self_attn\.(q|v)_proj"]
)
def test_adapter_of_the_whole_class(whole_class: str, tmp_path: Path, target_modules: list[str] | str) -> None:
    """Trap 56: other tools train Qwen3.5 with its vision part; such an adapter acts the same on the text part."""
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(whole_class, dtype=torch.float32).eval()
    with torch.no_grad():
        bare = whole(input_ids=IDS).logits
    expected = save_random_lora(whole, tmp_path / "adapter", target_modules)
    assert all(".language_model." in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    text_part = AutoModelForCausalLM.from_pretrained(whole_class, dtype=torch.float32)
    assert type(text_part).__name__ == "Qwen3_5ForCausalLM"
    _, info = read_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        found = load_adapter(text_part, str(tmp_path / "adapter"), info)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - bare).abs().max() > 0.01
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))["target_modules"]


def test_our_adapter_for_the_whole_class(whole_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 56: as it is saved, it has no effect there; written for that class, it has the same effect as here."""
    arguments = ModelArguments(model_path=whole_class)
    text_part = load_model(arguments, torch.float32, torch.device("cpu"))
    assert "of Qwen3_5ForConditionalGeneration only the text part" in capsys.readouterr().out
    with torch.no_grad():
        bare = text_part(input_ids=IDS).logits
    change = save_random_lora(text_part, tmp_path / "adapter", ["q_proj", "v_proj", "in_proj_qkv", "out_proj"]) - bare
    write_for_multimodal(str(tmp_path / "adapter"), str(tmp_path / "whole"))
    changes = []
    for folder in ("adapter", "whole"):
        whole = Qwen3_5ForConditionalGeneration.from_pretrained(whole_class, dtype=torch.float32).eval()
        with torch.no_grad():
            before = whole(input_ids=IDS).logits
            changes.append(PeftModel.from_pretrained(whole, tmp_path / folder)(input_ids=IDS).logits - before)
    assert changes[0].abs().max() == 0 and change.abs().max() > 0.01
    torch.testing.assert_close(changes[1], change, rtol=0, atol=1e-5)
    names = load_file(tmp_path / "whole" / WEIGHTS)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
