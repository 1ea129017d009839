"""merge_adapter.py: what is served answers as what was trained, on every architecture (traps 10, 24, 47, 56, 57)."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import TOKENS, Run, make_model, make_tokenizer, save_checkpoint
from transformers import AutoConfig, AutoTokenizer

import inference
import merge_adapter
from common import load_model
from finetuning.adapter.folder import describe_adapter
from finetuning.adapter.soft_prompts import SoftPromptModel
from finetuning.cli.arguments import ModelArguments
from finetuning.generation import verification
from finetuning.preprocessing.rows import Rows
from finetuning.preprocessing.templates import set_prompt_format, set_thinking

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "MAX_NEW_TOKENS", 12)


@pytest.fixture
def merge(run_main: Run, rows_path: str, tmp_path: Path) -> Run:
    """Run the command on the adapter in tmp_path/adapter."""
    flags = ["--adapter_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    return partial(run_main, merge_adapter, *flags, "--check_data_path", rows_path)


def push_down(model: torch.nn.Module) -> torch.nn.Module:
    """As pretraining does, make the ids without a token improbable."""
    head = model.get_output_embeddings().weight.data
    head[len(make_tokenizer()) :] = head[: len(make_tokenizer())].mean(dim=0)
    return model


def save_whole(folder: Path, moe: str, tokenizer: Any) -> str:
    """A checkpoint as released since Qwen3.5: text, vision, and `mtp` weights that transformers leaves out."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16}
    text = make_model("qwen3_5_text").config.to_dict()
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if moe else {}
    text |= {"shared_expert_intermediate_size": 16, "model_type": f"qwen3_5{moe.lower()}_text"}
    torch.manual_seed(0)
    config = getattr(transformers, f"Qwen3_5{moe}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"Qwen3_5{moe}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(folder, tokenizer, push_down(model))
    mtp = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.self_attn.q_proj.weight": torch.randn(64, 32)}
    save_file(load_file(folder / WEIGHTS) | mtp, folder / WEIGHTS, metadata={"format": "pt"})
    return str(folder)


def save_base(folder: Path, kind: str, tokenizer: Any = None) -> str:
    """A checkpoint of random weights; `kind` is a model type, or a class with vision."""
    tokenizer = tokenizer or make_tokenizer()
    if kind.startswith("whole"):
        return save_whole(folder, kind.removeprefix("whole"), tokenizer)
    model_type, _, tied = kind.partition(" ")
    changes = {"mlp_only_layers": []} if model_type == "qwen3_next" else {}  # with experts, as released
    model = make_model(model_type, tie_word_embeddings=bool(tied), **changes)
    return save_checkpoint(folder, tokenizer, push_down(model))


def save_random_adapter(
    base: str,
    folder: Path,
    method: str,
    thinking: bool = False,
    count: int = TOKENS,
    in_4bit: bool = False,
    **lora: Any,
) -> None:
    """An adapter of random weights, with what training saves beside it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_prompt_format(tokenizer, "auto")
    set_thinking(tokenizer, thinking)
    model = load_model(ModelArguments(base, in_4bit), torch.float32, CPU)
    if method == "lora":
        options = {"target_modules": "all-linear", "lora_alpha": 16, "lora_dropout": 0.0} | lora
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    else:
        model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise + (parameter.data if "lora_" not in name or "magnitude" in name else 0)
    model.save_pretrained(folder)
    for name, text in describe_adapter(model, tokenizer, Rows("none", ""), {}).items():
        (folder / name).write_text(text, encoding="utf-8")


def read_difference(printed: str) -> float:
    assert "equal prompts 8, equal first tokens 8, equal answers 8" in printed, printed
    return float(printed.split("largest logit difference ")[1].split(" ")[0])


KINDS = ["qwen2", "qwen3", "qwen3 tied", "qwen2_moe", "qwen3_moe", "qwen3_next", "whole", "wholeMoe"]


@pytest.mark.parametrize("method", ["lora", "soft prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_base_and_adapter(
    kind: str, method: str, merge: Run, run_main: Run, rows_path: str, tmp_path: Path
) -> None:
    """Traps 24, 47, 56: a checkpoint of the base's class with all of its tensors; those that the adapter does not reach
    equal it byte for byte. Its answers are the adapter's, also those of inference.py."""
    base = save_base(tmp_path / "base", kind)
    save_random_adapter(base, tmp_path / "adapter", method)
    assert read_difference(merge()) <= (1e-3 if method == "lora" else 1e-5)

    before, after = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert before.keys() <= after.keys() <= before.keys() | {"lm_head.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "lora":
        layers = {name.split("layers.")[1].split(".")[0] for name in changed}
        assert len(layers) == (2 if "next" not in kind and "whole" not in kind else 4)
        assert not any(part in name for part in ("embed", "visual", "mtp") for name in changed)
        assert any("experts.3.down_proj" in name for name in changed) == (kind in ("qwen3_moe", "qwen3_next"))
    else:
        assert len(changed - {"lm_head.weight"}) == 1 and all("visual" not in name for name in changed)
        assert ("lm_head.weight" in after) and AutoConfig.from_pretrained(
            tmp_path / "merged"
        ).tie_word_embeddings is False
    assert (
        json.loads((tmp_path / "merged/config.json").read_text("utf-8"))["architectures"]
        == json.loads((tmp_path / "base/config.json").read_text("utf-8"))["architectures"]
    )

    flags = ["--data_path", rows_path, "--max_new_tokens", 8]
    expected = run_main(inference, "--adapter_path", tmp_path / "adapter", *flags)
    assert run_main(inference, "--model_path", tmp_path / "merged", *flags) == expected
    assert len(set(expected.splitlines())) > 3
