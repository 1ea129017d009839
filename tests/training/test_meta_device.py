"""On the meta device, which raises on a mix with CPU tensors and on any value read: what a GPU would wait for."""

import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import ENDOFTEXT, FLAT, HYBRID, IM_END, TOKENS, make_model, make_rows, make_soft
from transformers import GenerationConfig

from finetuning.generation.generate import pad_left
from finetuning.generation.labels import score_labels
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.training.attention import attention
from finetuning.training.collators import FlattenCollator, PadCollator
from finetuning.training.losses import put_loss_head

MASKS = {"_ignore_causal_mask_sdpa", "create_recurrent_attention_mask"}  # is there padding at all?
GENERATION = {"_prepare_special_tokens", "generate", "_get_logits_processor"}  # checks before the first token
END = "__call__"  # of transformers' StopCheck: is every answer finished?


def to_meta(model_type: str, method: str) -> torch.nn.Module:
    if method == "soft prompt":
        model = make_soft(model_type)
    else:
        model = get_peft_model(make_model(model_type), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    # the grouped products of experts want bfloat16 on this device
    return model.to("meta", dtype=torch.bfloat16 if "moe" in model_type else torch.float32)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions that read a value, which only those of transformers may: everything is False but END."""
    found = set()

    def read(tensor: torch.Tensor) -> bool:
        caller = sys._getframe(1)
        assert caller.f_globals["__name__"].startswith("transformers."), caller
        found.add(caller.f_code.co_name)
        return caller.f_code.co_name == END

    monkeypatch.setattr(torch.Tensor, "__bool__", read)
    monkeypatch.setattr(torch.Tensor, "item", read)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "soft prompt"])
@pytest.mark.parametrize("kernel", ["varlen", "rows", "repeated_rows", "padded rows", "padded repeated_rows"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_a_training_step_reads_nothing(model_type: str, kernel: str, method: str, checkpointing: bool) -> None:
    """Collator, forward, chunked loss and backward; with PyTorch's own `varlen_attn`, which knows this device."""
    padded, kernel = kernel.startswith("padded"), kernel.removeprefix("padded ")
    if model_type in HYBRID and not padded:
        pytest.skip("hybrid models are always padded")
    model = to_meta(model_type, method).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    virtual = TOKENS if method == "soft prompt" else 0
    collated = (PadCollator(ENDOFTEXT, virtual) if padded else FlattenCollator(virtual))(make_rows())
    batch: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in collated.items()
    }
    base = model.get_base_model()
    items = torch.ones((), dtype=torch.long, device="meta")
    with attention(base, kernel):
        loss = put_loss_head(base).loss(model, batch, items)
        loss.backward()
    assert loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_mask_would_be_read() -> None:
    """Why padded batches have none."""
    model, batch = to_meta("qwen2", "LoRA"), PadCollator(ENDOFTEXT)(make_rows())
    ids = batch["input_ids"].to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("method", ["LoRA", "soft prompt"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_label_scoring_reads_only_masks(model_type: str, method: str, readers: set[str]) -> None:
    model = to_meta(model_type, method).eval()
    scores = score_labels(model, [[1, 2, 3], [4]], [[5, 6, ENDOFTEXT], [5, 8, 9, ENDOFTEXT]], ENDOFTEXT)
    assert scores.shape == (2, 2) and scores.device.type == "meta" and readers <= MASKS


@pytest.mark.parametrize("method", ["LoRA", "soft prompt"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_the_first_token_reads_only_what_transformers_checks(model_type: str, method: str, readers: set[str]) -> None:
    model = to_meta(model_type, method).eval()
    input_ids, attention_mask = pad_left(model, [[1, 2, 3], [4]], ENDOFTEXT)
    config = GenerationConfig(max_new_tokens=1, eos_token_id=[ENDOFTEXT, IM_END], pad_token_id=ENDOFTEXT)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    assert output.shape == (2, 4 + (TOKENS if isinstance(model, SoftPromptModel) else 0))
    assert readers <= MASKS | GENERATION | {END}
