"""Answers: from prompts to generated texts, in batches or as a stream."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from prompts import PLAIN_ANSWER, clean_answer, encode_messages, stop_token_ids, to_messages
from rows import question
from soft_prompts import SoftPromptModel

MAX_NEW_TOKENS = 256  # longest answer


@dataclass
class Answer:
    text: str
    token_ids: list[int]  # with the stop token, if there is one
    cut: bool  # ended by max_new_tokens, without a stop token


def make_generation_config(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> GenerationConfig:
    """How answers are generated: greedily, and up to either of Qwen's stop tokens.

    Every value that counts is set, because `generate` takes what is left out from the model's own configuration: that
    of Qwen2.5-Instruct asks for sampling and a repetition penalty of 1.05.
    """
    stop_ids = stop_token_ids(tokenizer)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        **sampling,
        repetition_penalty=repetition_penalty,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )


def encode_question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt of a row: the token ids up to where its answer begins."""
    return encode_messages(to_messages(question(row), tokenizer), tokenizer)[0]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Answer a batch of prompts; each answer is the one that its prompt would get alone.

    Args:
        prompts: token ids, of any lengths.
        config: from `make_generation_config`.
        streamer: gets the tokens as they come, where there is one prompt.
    """
    input_ids, attention_mask = pad_left(model, prompts, config.pad_token_id)
    length = input_ids.shape[1]
    penalties = []
    if config.repetition_penalty != 1:
        # transformers' own would count the padding, which is a stop token, and the prompt of LoRA but no soft prompt's
        behind = 0 if isinstance(model, SoftPromptModel) else length
        penalties = [RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_ignore_length=behind)]
        config = copy(config)
        config.repetition_penalty = 1.0
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        logits_processor=penalties,
        streamer=streamer,
    )
    answers = []
    for ids in output[:, length:].tolist():
        end = next((place for place, token in enumerate(ids) if token in config.eos_token_id), None)
        text = clean_answer(tokenizer.decode(ids[:end]), tokenizer)
        answers.append(Answer(text, ids if end is None else ids[: end + 1], cut=end is None))
    return answers


def pad_left(model: PreTrainedModel, prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay prompts, behind the virtual tokens that the model may have, into a batch that ends where answers begin.

    Returns:
        `input_ids` and `attention_mask`, (B, L) on the model's device.
    """
    if isinstance(model, SoftPromptModel):
        prompts = [model.virtual_tokens + ids for ids in prompts]
    length = max(map(len, prompts))
    input_ids = [[pad_token_id] * (length - len(ids)) + ids for ids in prompts]
    attention_mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids, device=model.device), torch.tensor(attention_mask, device=model.device)


def batches_by_length(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the prompts in batches of similar length, the longest first: short memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def answer_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch_size: int,
    config: GenerationConfig,
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Answer prompts in batches; yields the numbers of a batch's prompts, and for each `prediction`, perhaps `cut`."""
    for numbers in batches_by_length(prompts, batch_size):
        answers = generate(model, tokenizer, [prompts[number] for number in numbers], config)
        yield numbers, [{"prediction": answer.text} | ({"cut": True} if answer.cut else {}) for answer in answers]


class AnswerStreamer(BaseStreamer):
    """Hands on the text of an answer while it is generated, without what only belongs to the format."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.stop_ids = stop_token_ids(tokenizer)
        self.token_ids: list[int] | None = None  # the first tokens that come are the prompt's
        self.text = ""  # what has been written

    def put(self, value: torch.Tensor) -> None:
        if self.token_ids is None:
            self.token_ids = []
            return
        self.token_ids += [token for token in value.tolist() if token not in self.stop_ids]
        text = self.tokenizer.decode(self.token_ids)
        # a character may take several tokens, and so do the words that stand before a plain answer
        if not text.endswith("\ufffd") and not PLAIN_ANSWER.startswith(text):
            self.write_up_to(clean_answer(text, self.tokenizer))

    def end(self) -> None:
        self.write_up_to(clean_answer(self.tokenizer.decode(self.token_ids), self.tokenizer))

    def write_up_to(self, text: str) -> None:
        self.write(text[len(self.text) :])
        self.text = text
