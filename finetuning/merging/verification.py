"""Proof that a merged checkpoint answers as the base model with its adapter.

It is loaded as any other program would load it, and compared on a few rows: the prompts that its own template gives,
the logits along the answers of base and adapter, and the answers to a left-padded batch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetuning.cli.console import say
from finetuning.generation.generate import encode_question, generate, make_generation_config, pad_left, without_answer
from finetuning.preprocessing.encode import to_messages
from finetuning.preprocessing.templates import Message

MAX_NEW_TOKENS = 64
# The largest difference of a logit that rounding may give, as a share of the largest logit.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# In a mixture of experts, rounding hands a token over to another expert if two come close. This share of the tokens,
# and of the answers that follow from them, may then differ by more: seen once in 128 tokens with random weights.
HANDED_OVER = 0.05
# The negative control: the base model alone must be so many times as far away, as the mean of all tokens.
CLEARLY = 4


@dataclass
class Reference:
    """How base model and adapter answer some rows."""

    questions: list[list[Message]]
    prompts: list[list[int]]  # token ids, without a soft prompt
    answers: list[list[int]]  # with the stop token, or cut at MAX_NEW_TOKENS
    logits: list[torch.Tensor]  # of each answer: (tokens, rows of the vocabulary), float32
    effects: list[float]  # for each token of the answers the largest change of a logit that the adapter makes


def make_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Reference:
    """Let base model and adapter answer, greedily and each row alone."""
    config = make_generation_config(tokenizer, MAX_NEW_TOKENS)
    questions = [to_messages(without_answer(row), tokenizer) for row in rows]
    prompts = [encode_question(row, tokenizer) for row in rows]
    answers = [generate(model, tokenizer, [prompt], config)[0].token_ids for prompt in prompts]
    logits, effects = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        input_ids, _ = pad_left(model, [prompt + answer], config.pad_token_id)
        logits.append(logits_of_answer(model, input_ids, len(answer)))
        with model.disable_adapter():
            alone = logits_of_answer(model, torch.tensor([prompt + answer], device=model.device), len(answer))
        effects += (logits[-1] - alone).abs().amax(dim=1).tolist()
    return Reference(questions, prompts, answers, logits, effects)


@torch.inference_mode()
def logits_of_answer(model: PreTrainedModel, input_ids: torch.Tensor, length: int) -> torch.Tensor:
    """The logits that chose the last `length` ids of a row (1, L)."""
    output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), logits_to_keep=length + 1)
    return output.logits[0, :-1].float().cpu()


@dataclass
class Comparison:
    """How a merged checkpoint differs from a reference."""

    differences: list[float]  # for each token of the answers the largest, of the logits that the base model has too
    scale: float  # the largest logit
    prompts: int  # that its own template gives as they were trained
    first_tokens: int  # that are the same
    answers: int  # that are the same
    leads: list[float]  # of each answer that differs: how much better, as a logit, the expected token was there
    rows: int
    experts: bool  # whether the model is a mixture of experts
    effects: list[float]  # of the reference: the differences of a base model without its adapter

    def is_good(self, dtype: torch.dtype) -> bool:
        """Whether all differences are those of rounding, with weights of this dtype, and the adapter is not lost."""
        rounding, handed_over = ROUNDING[dtype] * self.scale, HANDED_OVER if self.experts else 0
        tokens = sum(difference > rounding for difference in self.differences)
        answers = sum(lead > 2 * rounding for lead in self.leads)
        return (
            self.prompts == self.rows
            and all(map(math.isfinite, self.differences))
            and CLEARLY * sum(self.differences) < sum(self.effects)
            and tokens <= handed_over * len(self.differences)
            and answers <= math.ceil(handed_over * self.rows)
        )

    def print(self, name: str) -> None:
        """Print the numbers after a `name` that says what was compared."""
        parted = f" (where others part, the expected token led by {max(self.leads, default=0):.2g})"
        say(
            f"{name}, {self.rows} rows: largest logit difference {max(self.differences):.2g} (of the base alone "
            f"{max(self.effects):.2g}, largest logit {self.scale:.3g}), equal prompts {self.prompts}, equal first "
            f"tokens {self.first_tokens}, equal answers {self.answers}{parted if self.answers < self.rows else ''}"
        )


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference,
    soft_ids: list[int],
    plain_start: list[int],
) -> Comparison:
    """Compare a checkpoint that was loaded by its own files alone.

    Args:
        soft_ids: what its template puts in front of each conversation.
        plain_start: what its template puts before each answer, as a part of the trained answer.
    """
    tokenizer.padding_side = "left"
    served = tokenizer.apply_chat_template(
        reference.questions, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    length, limit = served.input_ids.shape[1], MAX_NEW_TOKENS - len(plain_start)
    found = model.generate(**served, max_new_tokens=limit, do_sample=False, repetition_penalty=1.0)
    experts = hasattr(model.config.get_text_config(), "num_experts")
    result = Comparison([], 0.0, 0, 0, 0, [], len(reference.answers), experts, reference.effects)
    for number, (prompt, answer, expected) in enumerate(
        zip(reference.prompts, reference.answers, reference.logits, strict=True)
    ):
        ids = served.input_ids[number][served.attention_mask[number].bool()].tolist()
        result.prompts += ids == soft_ids + prompt + plain_start
        row = torch.tensor([soft_ids + prompt + answer], device=model.device)
        logits = logits_of_answer(model, row, len(answer))[:, : expected.shape[1]]
        real = torch.ones(expected.shape[1], dtype=torch.bool)
        real[[token for token in soft_ids if token < len(real)]] = False
        difference = (logits - expected)[:, real].abs().nan_to_num(nan=math.inf)
        result.differences += difference.amax(dim=1).tolist()
        result.scale = max(result.scale, expected.abs().max().item())
        written = plain_start + found[number, length:].tolist()
        first = min(len(plain_start), len(answer) - 1)
        result.first_tokens += written[first] == answer[first]
        parting = [place for place, pair in enumerate(zip(written, answer, strict=False)) if pair[0] != pair[1]]
        result.answers += not parting
        if parting:
            scores, token = expected[parting[0]], written[parting[0]]
            result.leads.append((scores.max() - scores[token]).item() if token < len(scores) else math.inf)
    return result


def load_served(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, of the class in its configuration, and its tokenizer, with nothing of this project."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    whole = (config.architectures or [""])[0].endswith("ForConditionalGeneration")
    model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device} if device.type == "cuda" else None,
        trust_remote_code=trust_remote_code,
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
