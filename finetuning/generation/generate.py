"""From prompts to generated answers, in batches or as a stream."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from finetuning.cli.console import dim, fail
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import encode, pad_token_id, stop_token_ids, to_messages
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.rows import Row, expected_answer, split_reasoning
from finetuning.preprocessing.templates import OPENING, PLAIN_ANSWER, is_thinking, opens_reasoning, prompt_format

MAX_NEW_TOKENS, MAX_THINKING_TOKENS = 256, 2048  # longest answer; with its thought


@dataclass
class Answer:
    text: str
    thought: str  # "" for none
    token_ids: list[int]  # with the stop token, if there is one
    cut: bool  # it reached max_new_tokens without a stop token


def make_generation_config(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> GenerationConfig:
    """How answers are generated: by default greedily, up to either of Qwen's stop tokens.

    Every value that matters is set, because `generate` takes missing ones from the model's own configuration: that of
    Qwen2.5-Instruct asks for sampling and a repetition penalty of 1.05.
    """
    if max_new_tokens is None:
        max_new_tokens = MAX_THINKING_TOKENS if is_thinking(tokenizer) else MAX_NEW_TOKENS
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        **sampling,
        repetition_penalty=repetition_penalty,
        eos_token_id=stop_token_ids(tokenizer),
        pad_token_id=pad_token_id(tokenizer),
    )


def without_answer(row: Row) -> Row:
    """A row as a question: without its answer, if it has one."""
    if expected_answer(row) is None:
        return row
    if "messages" in row:
        return row | {"messages": row["messages"][:-1]}
    return {name: value for name, value in row.items() if name not in ("output", "reasoning_content")}


def encode_question(row: Row, tokenizer: PreTrainedTokenizerBase, where: str = "") -> list[int]:
    """The prompt of a row: its token ids up to the beginning of the answer. Errors begin with `where`."""
    try:
        return encode(to_messages(without_answer(row), tokenizer), tokenizer)[-1]["input_ids"]
    except DataError as error:
        fail(f"{where}{error}")


def parse_generated(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The reasoning and the answer in a generated text, without the parts that belong to the format."""
    if prompt_format(tokenizer) == "plain":
        text = text.removeprefix(PLAIN_ANSWER.rstrip()).removeprefix(" ")
    elif opens_reasoning(tokenizer, tokenizer.chat_template):
        text = OPENING + text
    return split_reasoning(text)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Answer a batch of prompts of any lengths. Each gets the answer that it would get alone.

    Args:
        streamer: gets each token as it is generated; for a single prompt only.
    """
    input_ids, attention_mask = pad_left(model, prompts, config.pad_token_id)
    length = input_ids.shape[1]
    penalties = []
    if config.repetition_penalty != 1:
        # only the answer counts, not the prompt, and not the padding, which is a stop token
        ignored = 0 if isinstance(model, SoftPromptModel) else length
        penalties = [RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_ignore_length=ignored)]
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
        thought, text = parse_generated(tokenizer.decode(ids[:end]), tokenizer)
        answers.append(Answer(text, thought, ids if end is None else ids[: end + 1], cut=end is None))
    return answers


def pad_left(model: PreTrainedModel, prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, (B, L) on the model's device: each prompt padded on the left, after the model's
    virtual tokens if it has any."""
    virtual = model.virtual_tokens if isinstance(model, SoftPromptModel) else []
    rows = [torch.tensor(virtual + prompt, dtype=torch.long) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    attention_mask = pad_sequence(masks, batch_first=True, padding_side="left")
    return input_ids.to(model.device), attention_mask.to(model.device)


def batches_by_length(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the prompts in batches of similar length, the longest first: memory runs out early or never."""
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
    """Answer prompts in batches. Yields the numbers of a batch's prompts, and for each `prediction`, perhaps `thought`
    and `cut`."""
    for numbers in batches_by_length(prompts, batch_size):
        predictions = []
        for answer in generate(model, tokenizer, [prompts[number] for number in numbers], config):
            more = {"thought": answer.thought, "cut": answer.cut}
            predictions.append({"prediction": answer.text} | {name: value for name, value in more.items() if value})
        yield numbers, predictions


class AnswerStreamer(BaseStreamer):
    """Prints an answer while it is generated, its thought dimmed, without the parts that belong to the format."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_token_ids(tokenizer)
        self.token_ids: list[int] | None = None  # None until the prompt has come, which is put first
        self.thought = self.answer = ""  # what has been printed

    def put(self, value: torch.Tensor) -> None:
        if self.token_ids is None:
            self.token_ids = []
            return
        self.token_ids += [token for token in value.tolist() if token not in self.stop_ids]
        text = self.tokenizer.decode(self.token_ids)
        # wait for the rest of a character of several tokens, of the words before a plain answer, and of a tag
        unfinished = any(text.endswith(tag[:end]) for tag in ("<think>", "</think>") for end in range(1, len(tag)))
        if not text.endswith("\ufffd") and not PLAIN_ANSWER.startswith(text) and not unfinished:
            self.print_up_to(*parse_generated(text, self.tokenizer))

    def end(self) -> None:
        self.print_up_to(*parse_generated(self.tokenizer.decode(self.token_ids), self.tokenizer))

    def print_up_to(self, thought: str, answer: str) -> None:
        if len(thought) > len(self.thought):
            print(dim(thought[len(self.thought) :]), end="", flush=True)
        if thought and answer and not self.answer:
            print()
        print(answer[len(self.answer) :], end="", flush=True)
        self.thought, self.answer = thought, answer
