"""Soft prompts: the loss, gradients and answers of rows alone, in every batch (traps 6 and 26)."""

import pytest
import torch
from peft import PeftModelForCausalLM
from support import ENDOFTEXT, FLAT, HYBRID, IM_END, TOKENS, make_rows, make_soft, make_tokenizer

from finetuning.generation.generate import generate
from finetuning.generation.generate import make_generation_config as config
from finetuning.preprocessing.templates import set_prompt_format
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_batch_equals_rows_alone_in_peft(model_type: str, mode: str) -> None:
    """Loss and gradient of the prompt against PEFT's own forward, one row at a time, on every architecture."""
    rows = make_rows()
    reference = make_soft(model_type, PeftModelForCausalLM)
    expected = torch.tensor(0.0)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, TOKENS:-1].float()
        expected = expected + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    expected.backward()

    model = make_soft(model_type).train(mode == "train")
    model.config.use_cache = True
    flatten = can_flatten(model.config)
    collator = FlattenCollator(TOKENS) if flatten else PadCollator(0, TOKENS)
    loss = model(**collator(rows), num_items_in_batch=torch.tensor(1)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = reference.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(model.prompt.grad, gradient, rtol=1e-4, atol=1e-5)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        padded = reference(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        assert model(**collator([row])).loss.item() == pytest.approx(padded.item(), abs=1e-5)


def questions(count: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (3 + 2 * n,), generator=generator).tolist() for n in range(count)]


STOPPING = {"do_sample": False, "eos_token_id": [ENDOFTEXT, IM_END], "pad_token_id": ENDOFTEXT}


def peft_generate(model: PeftModelForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of PEFT's own generate to a left-padded batch."""
    length = max(map(len, prompts))
    ids = torch.tensor([[ENDOFTEXT] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, **STOPPING)[:, length:].tolist()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_5_text"])
def test_batched_answers_equal_single_ones(model_type: str) -> None:
    """Trap 6: a left-padded batch of 16 rows of different lengths, greedy, with the key-value cache, against PEFT's
    own answers one at a time."""
    tokenizer = make_tokenizer()
    set_prompt_format(tokenizer, "auto")
    model = make_soft(model_type)
    batched = [answer.token_ids for answer in generate(model, tokenizer, questions(), config(tokenizer, 12))]
    reference = make_soft(model_type, PeftModelForCausalLM)
    assert batched == [peft_generate(reference, [ids])[0] for ids in questions()]
    assert len(set(map(tuple, batched))) > 4


def test_pefts_own_batches_answer_differently() -> None:
    """Why soft_prompts.py is there (huggingface/peft#1093). When this fails, PEFT is right and the file may go."""
    reference = make_soft(cls=PeftModelForCausalLM)
    assert peft_generate(reference, questions()) != [peft_generate(reference, [ids])[0] for ids in questions()]


def test_half_precision_base() -> None:
    """As on a GPU: the prompt stays float32 and gets its gradient through a half-precision base."""
    model = make_soft()
    model.base_model.to(torch.bfloat16)
    model(**FlattenCollator(TOKENS)(make_rows())).loss.backward()
    assert model.prompt.dtype == model.prompt.grad.dtype == torch.float32
    assert model.prompt.grad.isfinite().all() and model.prompt.grad.abs().sum() > 0
