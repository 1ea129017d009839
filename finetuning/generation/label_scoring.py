"""Classification by scoring: which of some labels the model would answer, and how probable each is."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.generation.generate import batches_by_length, generate, pad_left
from finetuning.preprocessing.encode import IGNORE_INDEX, encode, pad_token_id, tokenize
from finetuning.preprocessing.templates import CLOSING, OPENING, is_thinking, opens_reasoning


def classify_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    labels_of_prompts: list[tuple[str, ...]],
    batch_size: int,
    config: GenerationConfig,
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Choose among labels; yields the numbers of a batch's prompts, and for each `prediction` and `probabilities`.

    In thinking mode the model first writes its thought, and the labels are scored after it.

    Args:
        labels_of_prompts: the labels of each prompt, from `labels.choose_labels`.
        batch_size: the most labels scored at once; a prompt with more labels makes a batch of its own.
        config: how thoughts are generated.
    """
    for labels in dict.fromkeys(labels_of_prompts):
        label_ids = [encode_label(label, tokenizer) for label in labels]
        own = [number for number, its_labels in enumerate(labels_of_prompts) if its_labels == labels]
        for places in batches_by_length([prompts[number] for number in own], max(1, batch_size // len(labels))):
            numbers = [own[place] for place in places]
            batch, thoughts = [prompts[number] for number in numbers], [{}] * len(numbers)
            if is_thinking(tokenizer):
                batch, thoughts = think(model, tokenizer, batch, config)
            scores = score_labels(model, batch, label_ids, pad_token_id(tokenizer))
            predictions = []
            for probabilities, thought in zip(scores.softmax(dim=1).tolist(), thoughts, strict=True):
                ranked = sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])
                rounded = {label: round(probability, 6) for label, probability in ranked}
                predictions.append({"prediction": ranked[0][0], "probabilities": rounded} | thought)
            yield numbers, predictions


def think(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: GenerationConfig
) -> tuple[list[list[int]], list[dict[str, str]]]:
    """Let the model write its thoughts; returns the prompts with them, up to where the answers begin, and the texts."""
    opening = "" if opens_reasoning(tokenizer, tokenizer.chat_template) else OPENING
    thoughts = [answer.thought for answer in generate(model, tokenizer, prompts, config)]
    ids = tokenize([opening + thought + CLOSING for thought in thoughts], tokenizer)
    prompts = [prompt + its_ids for prompt, its_ids in zip(prompts, ids, strict=True)]
    return prompts, [{"thought": thought} for thought in thoughts]


def encode_label(label: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a label as an answer, as training would supervise them: with the format and the stop token."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": label}]
    return [token for token in encode(messages, tokenizer)[0]["labels"] if token != IGNORE_INDEX]


@torch.inference_mode()
def score_labels(
    model: PreTrainedModel, prompts: list[list[int]], labels: list[list[int]], pad_id: int
) -> torch.Tensor:
    """The log-probability of each label after each prompt: the sum over all its tokens.

    The prompts, with the tokens that all labels begin with, go through the model once; the rest of each label then
    continues from the key-value cache.

    Args:
        prompts: B lists of token ids.
        labels: N lists of token ids, from `encode_label`, all different.

    Returns:
        (B, N), natural logarithms, float32.
    """
    shared = os.path.commonprefix(labels)
    rests = [label[len(shared) :] for label in labels]  # at least the stop token: no label is the start of another
    input_ids, attention_mask = pad_left(model, [prompt + shared for prompt in prompts], pad_id)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=len(shared) + 1,
    )
    log_probabilities = output.logits.float().log_softmax(dim=-1)  # (B, shared + 1, vocabulary)
    shared_ids = torch.tensor(shared, dtype=torch.long, device=model.device).expand(len(prompts), -1)
    of_shared = log_probabilities[:, :-1].gather(2, shared_ids.unsqueeze(2)).sum(dim=(1, 2))
    first_ids = torch.tensor([rest[0] for rest in rests], device=model.device)
    scores = of_shared.unsqueeze(1) + log_probabilities[:, -1, first_ids]  # (B, N)

    longest = max(map(len, rests))
    if longest == 1:
        return scores
    rest_ids = torch.tensor([rest + [pad_id] * (longest - len(rest)) for rest in rests], device=model.device)
    real = torch.tensor([[1] * len(rest) + [0] * (longest - len(rest)) for rest in rests], device=model.device)
    rest_ids, real = rest_ids.repeat(len(prompts), 1), real.repeat(len(prompts), 1)  # (B * N, longest)
    each_label = torch.arange(len(prompts), device=model.device).repeat_interleave(len(labels))
    output.past_key_values.reorder_cache(each_label)
    output = model(
        input_ids=rest_ids[:, :-1],
        attention_mask=torch.cat([attention_mask[each_label], real[:, :-1]], dim=1),
        position_ids=position_ids[each_label, -1:] + torch.arange(1, longest, device=model.device),
        past_key_values=output.past_key_values,
        use_cache=True,
    )
    log_probabilities = output.logits.float().log_softmax(dim=-1).gather(2, rest_ids[:, 1:].unsqueeze(2)).squeeze(2)
    return scores + (log_probabilities * real[:, 1:]).sum(dim=1).view_as(scores)
