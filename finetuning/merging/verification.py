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
from finetuning.generation.generate import encode_question, generate, make_generation_config, without_answer
from finetuning.model.multimodal import is_multimodal
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import to_messages
from finetuning.preprocessing.templates import Message

MAX_NEW_TOKENS = 64
# The largest difference of a logit that rounding may give, as a share of the largest logit.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# In a mixture of experts, rounding can flip the routing of a token if two experts score nearly the same. This share of
# the tokens, and of the answers that follow from them, may differ by more: seen once in 128 with random weights.
ROUTING_FLIPS = 0.05
# The negative control: the base model alone must be so many times as far away, as the mean of all tokens.
CLEARLY = 4


@dataclass
class Expected:
    """How base model and adapter answer a row."""

    question: list[Message]
    prompt: list[int]  # token ids, without a soft prompt
    answer: list[int]  # with the stop token, or cut at MAX_NEW_TOKENS
    logits: torch.Tensor  # of the answer: (tokens, rows of the vocabulary), float32
    effects: list[float]  # for each token of the answer the largest change of a logit that the adapter makes


def answer_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> list[Expected]:
    """Let base model and adapter answer, greedily and each row alone."""
    config, expected = make_generation_config(tokenizer, MAX_NEW_TOKENS), []
    virtual = model.virtual_tokens if isinstance(model, SoftPromptModel) else []
    for row in rows:
        prompt = encode_question(row, tokenizer)
        answer = generate(model, tokenizer, [prompt], config)[0].token_ids
        logits = logits_of_answer(model, virtual + prompt, answer)
        with model.disable_adapter():
            effects = (logits - logits_of_answer(model, prompt, answer)).abs().amax(dim=1).tolist()
        expected.append(Expected(to_messages(without_answer(row), tokenizer), prompt, answer, logits, effects))
    return expected


@torch.inference_mode()
def logits_of_answer(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits that choose each token of an answer: (tokens, rows of the vocabulary), float32, on the CPU."""
    input_ids = torch.tensor([prompt + answer], device=model.device)
    output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), logits_to_keep=len(answer) + 1)
    return output.logits[0, :-1].float().cpu()


@dataclass
class Comparison:
    """How the answers of a merged checkpoint differ from the expected ones."""

    differences: list[float]  # for each token of the answers the largest, of the logits that the base model has too
    scale: float  # the largest logit
    prompts: int  # that its own template gives as they were trained
    first_tokens: int  # that are the same
    answers: int  # that are the same
    margins: list[float]  # for each other answer: logit of the expected token minus that of the generated one
    rows: int
    experts: bool  # whether the model is a mixture of experts
    effects: list[float]  # the differences of the base model without its adapter

    def is_good(self, dtype: torch.dtype) -> bool:
        """Whether all differences are those of rounding, with weights of this dtype, and the adapter is not lost."""
        rounding, flips = ROUNDING[dtype] * self.scale, ROUTING_FLIPS if self.experts else 0
        tokens = sum(difference > rounding for difference in self.differences)
        answers = sum(margin > 2 * rounding for margin in self.margins)
        return (
            self.prompts == self.rows
            and all(map(math.isfinite, self.differences))
            and not self.loses_adapter()
            and tokens <= flips * len(self.differences)
            and answers <= math.ceil(flips * self.rows)
        )

    def loses_adapter(self) -> bool:
        """Whether the differences are so large that the base model alone is not clearly farther away."""
        return CLEARLY * sum(self.differences) >= sum(self.effects)

    def print(self, name: str) -> None:
        """Print the numbers after a `name` that says what was compared."""
        margin = f" (where others part, the expected token led by {max(self.margins, default=0):.2g})"
        say(
            f"{name}, {self.rows} rows: largest logit difference {max(self.differences):.2g} (of the base alone "
            f"{max(self.effects):.2g}, largest logit {self.scale:.3g}), equal prompts {self.prompts}, equal first "
            f"tokens {self.first_tokens}, equal answers {self.answers}{margin if self.answers < self.rows else ''}"
        )


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Expected],
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
        [row.question for row in rows], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    limit = MAX_NEW_TOKENS - len(plain_start)
    output = model.generate(**served, max_new_tokens=limit, do_sample=False, repetition_penalty=1.0)
    generated = output[:, served.input_ids.shape[1] :].tolist()
    experts = hasattr(model.config.get_text_config(), "num_experts")
    result = Comparison([], 0.0, 0, 0, 0, [], len(rows), experts, [])
    for row, ids, mask, written in zip(rows, served.input_ids, served.attention_mask.bool(), generated, strict=True):
        result.prompts += ids[mask].tolist() == soft_ids + row.prompt + plain_start
        size = row.logits.shape[1]  # the vocabulary of the base
        difference = (logits_of_answer(model, soft_ids + row.prompt, row.answer)[:, :size] - row.logits).abs()
        difference[:, [token for token in soft_ids if token < size]] = 0
        result.differences += difference.nan_to_num(nan=math.inf).amax(dim=1).tolist()
        result.effects += row.effects
        result.scale = max(result.scale, row.logits.abs().max().item())
        written = plain_start + written
        first = min(len(plain_start), len(row.answer) - 1)
        result.first_tokens += written[first] == row.answer[first]
        pairs = enumerate(zip(written, row.answer, strict=False))
        parting = next((place for place, (token, right) in pairs if token != right), None)
        if parting is None:
            result.answers += 1
        else:
            scores, token = row.logits[parting], written[parting]
            result.margins.append((scores.max() - scores[token]).item() if token < size else math.inf)
    return result


def load_served(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, of the class in its configuration, and its tokenizer, with nothing of this project."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    auto_class = AutoModelForImageTextToText if is_multimodal(config.architectures) else AutoModelForCausalLM
    model = auto_class.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device} if device.type == "cuda" else None,
        trust_remote_code=trust_remote_code,
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
