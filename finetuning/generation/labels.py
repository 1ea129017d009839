"""Classification: the label words of a task, which of them `--labels` allows, and how probable the model finds each."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from os.path import commonprefix
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.cli.console import fail, warn
from finetuning.generation.generate import batches_by_length, generate, pad_left
from finetuning.preprocessing.encode import IGNORE_INDEX, encode, pad_token_id, tokenize
from finetuning.preprocessing.rows import NO_TASK, Row, as_label, task_of, to_nfc
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import CLOSING, OPENING, is_thinking, opens_reasoning

# Answers are label words if there are few of them, they are short, and each comes often.
MAX_LABELS = 200  # of a task that `--labels auto` knows
ROWS_PER_LABEL = 3
MAX_ODD = 0.01  # share of a task's answers that may be no label words, such as one empty answer among 2,000


def labels_of_tasks(summary: Summary) -> dict[str, list[str]]:
    """The label words of each task of the data that has some."""
    counts: dict[str, dict[str | None, int]] = {}
    for answer in summary.answers:
        counts.setdefault(answer["task"], {})[answer["label"]] = answer["count"]
    return {task: labels for task, of_task in counts.items() if (labels := label_words(of_task, MAX_ODD))}


def find_labels(answers: Iterable[str]) -> list[str] | None:
    """The label words among a task's answers, in order of appearance; None if the answers are texts."""
    return label_words(Counter(map(as_label, answers)))


def label_words(counts: dict[str | None, int], most_odd: float = 0) -> list[str] | None:
    """The label words of a task; None if its answers are texts, or too few to tell.

    `counts` says how often each answer comes. None stands for those that are no label words, of which there may be a
    share of `most_odd`.
    """
    words, total = [word for word in counts if word is not None], sum(counts.values())
    is_task = len(words) > 1 and ROWS_PER_LABEL * len(words) <= total and counts.get(None, 0) <= most_odd * total
    return words if is_task else None


def warn_about_labels(summary: Summary) -> None:
    """Name label words that look the same, answers that are none, and tasks with more than `--labels auto` knows."""
    odd = {answer["task"]: answer["first"] for answer in summary.answers if answer["label"] is None}
    for task, labels in labels_of_tasks(summary).items():
        for one, other in look_alikes(labels):
            warn(f"task '{task}': the answers {one!r} and {other!r} are different label words; is one of them a typo?")
        if len(labels) > MAX_LABELS:
            warn(f"task '{task}' has {len(labels)} label words: --labels auto knows at most {MAX_LABELS} of a task")
        if task in odd:
            warn(f"task '{task}' has {len(labels)} label words, but the answer in row {odd[task]} is empty or long")


def look_alikes(labels: list[str]) -> list[tuple[str, str]]:
    """Pairs of labels that differ only in spaces, in capitals or in the width of their characters."""
    seen: dict[str, str] = {}
    pairs = []
    for label in labels:
        plain = "".join(unicodedata.normalize("NFKC", label).casefold().split())
        if plain in seen:
            pairs.append((seen[plain], label))
        seen.setdefault(plain, label)
    return pairs


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels in `--labels`: words with commas between, or a JSON list, which can hold any text."""
    try:
        labels = json.loads(text) if text.lstrip().startswith("[") else re.split("[,，]", text)
    except ValueError as error:
        fail(f"--labels {text}: not a JSON list: {error}")
    labels = tuple(to_nfc(label.strip()) if isinstance(label, str) else "" for label in labels)
    if len(labels) < 2 or "" in labels or len(set(labels)) < len(labels):
        example = """正面,负面 or, for words with commas, '["a, b", "c"]'"""
        fail(f"--labels {text}: name two or more different words: {example}")
    return labels


def choose_labels(wanted: str, rows: list[Row], known: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """The labels for each row: those given with `--labels` or, with auto, the known ones of its task in the training
    data, from `labels_of_tasks`."""
    if wanted != "auto":
        return [parse_labels(wanted)] * len(rows)
    if not known:
        fail(
            "--labels auto: the adapter knows no label words (short answers that are repeated in its training data);\n"
            "name the words: --labels 正面,负面"
        )
    chosen = []
    for number, row in enumerate(rows, 1):
        task = task_of(row)
        if len(known) == 1 and (task == NO_TASK or NO_TASK in known):  # the only task there is, here or in training
            task = next(iter(known))
        if task not in known:
            its_task = f"is of task '{task}', for" if "task" in row else "names no 'task', without"
            fail(
                f"--labels auto: row {number} {its_task} which the training data had no label words;\n"
                f"add --tasks {','.join(known)}, or name the words: --labels 正面,负面"
            )
        if len(known[task]) > MAX_LABELS:
            fail(
                f"--labels auto: task '{task}' has {len(known[task])} label words in the training data, more than the "
                f"{MAX_LABELS} that are chosen from;\nname the words: --labels 正面,负面"
            )
        chosen.append(tuple(known[task]))
    return chosen


def classify_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    labels_of_prompts: list[tuple[str, ...]],
    batch_size: int,
    config: GenerationConfig,
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Choose among labels; yields the numbers of a batch's prompts, and for each `prediction` and `probabilities`.

    In thinking mode the model first writes its reasoning, as `config` says, and the labels are scored after it.

    Args:
        labels_of_prompts: the labels of each prompt, from `choose_labels`.
        batch_size: the most labels scored at once; a prompt with more labels makes a batch of its own.
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
    """Let the model write its reasoning; returns the prompts with it, up to where the answers begin, and its texts."""
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
    shared = commonprefix(labels)
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

    rest_ids = pad_sequence([torch.tensor(rest) for rest in rests], batch_first=True, padding_value=pad_id)
    real = pad_sequence([torch.ones(len(rest), dtype=torch.long) for rest in rests], batch_first=True)
    longest = rest_ids.shape[1]
    if longest == 1:
        return scores
    # (B * N, longest)
    rest_ids, real = (each.to(model.device).repeat(len(prompts), 1) for each in (rest_ids, real))
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
