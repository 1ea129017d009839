"""Answering an instruction or the rows of a data file, by generation or by choosing among labels."""

import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from finetuning.cli.commands import inference_command
from finetuning.cli.console import fail, green, progress_bar, say, warn
from finetuning.cli.memory import memory_advice
from finetuning.distributed import shards_weights
from finetuning.generation.generate import (
    AnswerStreamer,
    answer_in_batches,
    encode_question,
    generate,
    make_generation_config,
    parse_generated,
)
from finetuning.generation.labels import classify_in_batches, labels_of_tasks
from finetuning.generation.metrics import report
from finetuning.generation.predictions import Predictions
from finetuning.model.fingerprint import changes_base
from finetuning.model.folder import METRICS
from finetuning.preprocessing.dataset import Data
from finetuning.preprocessing.encode import stop_token_ids
from finetuning.preprocessing.files import DataError, find_files
from finetuning.preprocessing.rows import Row, print_ignored, read_rows
from finetuning.preprocessing.show import split_parts

SAMPLE_TOKENS = 64  # of an answer that `show_answers` shows
MAX_CHARACTERS = 300


def load_rows(path: str, rename: dict[str, str] | None = None) -> list[Row]:
    """All rows of a --data_path, as questions to answer; a DataError ends the program."""
    rows, ignored = [], Counter[str]()
    try:
        for _, row, its_ignored in read_rows(path, find_files(path), rename or {}, output_required=False):
            rows.append(row)
            ignored.update(its_ignored)
    except DataError as error:
        fail(str(error))
    print_ignored(path, ignored)
    return rows


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    predictions: Predictions,
    batch_size: int,
    config: GenerationConfig,
    labels: list[tuple[str, ...]] | None = None,
    disable_tqdm: bool = False,
) -> None:
    """Answer the rows that `predictions` lacks, and add them to it batch by batch; with `labels`, by choosing among
    those of each row."""
    todo = [number for number in range(len(rows)) if number not in predictions.by_row]
    prompts = [encode_question(rows[number], tokenizer, f"row {number + 1}: ") for number in todo]
    if labels:
        own = [labels[number] for number in todo]
        batches = classify_in_batches(model, tokenizer, prompts, own, batch_size, config)
    else:
        batches = answer_in_batches(model, tokenizer, prompts, batch_size, config)
    with progress_bar("answering", "rows", len(rows), len(rows) - len(todo), disable_tqdm) as bar:
        for places, batch in batches:
            predictions.add([todo[place] for place in places], batch)
            bar.update(len(places))


def answer_instruction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    config: GenerationConfig,
    labels: list[tuple[str, ...]] | None = None,
) -> None:
    """Print the answer to one row, on a terminal while it is generated; or the labels' probabilities, best first."""
    prompt = encode_question(row, tokenizer)
    if labels:
        _, [prediction] = next(classify_in_batches(model, tokenizer, [prompt], labels, 1, config))
        for label, probability in prediction["probabilities"].items():
            print(f"{label}\t{probability:.4f}")
        return
    streamer = AnswerStreamer(tokenizer) if sys.stdout.isatty() else None
    answer = generate(model, tokenizer, [prompt], config, streamer)[0]
    if answer.thought and not streamer:
        print(f"thought: {answer.thought}", file=sys.stderr)  # stdout gets the answer alone
    print("" if streamer else answer.text)
    if answer.cut:
        warn(f"the answer was cut at {config.max_new_tokens} tokens (--max_new_tokens)")


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Data,
    eval_data: Data | None,
    eval_metrics: bool,
    sample_answers: int,
    training_args: TrainingArguments,
) -> str:
    """Answer the evaluation rows with a trained adapter, score the answers, and show a few, or a few of the training
    rows if there are no others. A process that has only a part of the base weights cannot answer.

    Returns:
        The scores, which are printed, and written into metrics.json beside the adapter; "" if there are none.
    """
    rows, path = eval_data.read_rows() if eval_data and eval_metrics else None, (eval_data or train_data).summary.path
    if not rows and not sample_answers:
        return ""
    output_dir, batch_size, scores = training_args.output_dir, training_args.per_device_eval_batch_size, ""
    command = f"{inference_command(output_dir)} --data_path {path}"
    if shards_weights(training_args):
        say(f"no answers, as the weights are sharded; for them: {command}")
        return ""
    model.eval()  # no dropout, and no gradient checkpointing, which breaks generation
    place = "after the adapter was saved, while answering rows"
    with memory_advice(training_args.device, [f"{command} --batch_size 1"], place):
        if rows:
            predictions, config = Predictions(None, {}), make_generation_config(tokenizer)
            quiet = training_args.disable_tqdm
            answer_rows(model, tokenizer, rows, predictions, batch_size, config, disable_tqdm=quiet)
            labels, file = labels_of_tasks(train_data.summary), Path(output_dir, METRICS)
            scores = report(rows, predictions.in_order(), labels, file, data_path=path)
        if sample_answers:
            show_answers(model, tokenizer, (eval_data or train_data).dataset, sample_answers)
    return scores


def show_answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, count: int) -> None:
    """Print some rows, evenly spaced, with the right answer, the base model's and the adapter's."""
    examples = [dataset[number] for number in range(0, len(dataset), max(1, len(dataset) // count))][:count]
    spans = [[part for part in split_parts(example["labels"]) if part[2]][-1] for example in examples]
    starts = [start for start, _, _ in spans]
    prompts = [example["input_ids"][:start] for example, start in zip(examples, starts, strict=True)]
    config = make_generation_config(tokenizer, max_new_tokens=SAMPLE_TOKENS)
    of_base = []
    if not changes_base(model):
        with model.disable_adapter():
            of_base = generate(model.get_base_model(), tokenizer, prompts, config)
    of_adapter = generate(model, tokenizer, prompts, config)
    stop_ids = stop_token_ids(tokenizer)
    for example, (start, end, _), base, adapter in zip_longest(examples, spans, of_base, of_adapter):
        supervised = [token for token in example["input_ids"][start:end] if token not in stop_ids]
        right = "".join(parse_generated(tokenizer.decode(supervised), tokenizer))
        name, text = f"row {example['row_number']}", adapter.thought + adapter.text
        say(f"\n{name:11} {shorten(tokenizer.decode(example['input_ids'][:start]))}")
        say(f"  right     {shorten(right)}")
        if base:
            say(f"  base      {shorten(base.thought + base.text)}")
        say(f"  adapter   {green(shorten(text)) if text == right else shorten(text)}")


def shorten(text: str) -> str:
    """The text in one line, without the middle of a long one."""
    half = MAX_CHARACTERS // 2
    return repr(text if len(text) <= MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}")
