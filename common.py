"""What the scripts share, in the order a run uses it: model, data, training."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from adapters import INFO, TEMPLATE, adapter_state, base_fingerprint, describe_run, save_adapter
from arguments import DataArguments, ModelArguments
from checkpoints import find_resume_checkpoint, remove_checkpoints, remove_leftovers
from collators import IGNORE_INDEX
from console import fail, first_line, say
from generation import MAX_NEW_TOKENS, answer_in_batches, encode_question, make_generation_config
from guards import StopOnSignal
from labels import labels_by_task
from memory import GIB, memory_advice, peak_memory, print_plan
from metrics import METRICS, report
from prompts import (
    encode_messages,
    mark_answers,
    prompt_format,
    set_prompt_format,
    split_turns,
    stop_token_ids,
    to_messages,
)
from rows import load_rows
from trainer import fast_steps, make_trainer

# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments, format_name: str) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with the chat template of the format `auto`, `chat` or `plain`."""
    check_model_path(model_args.model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"--model_path '{model_args.model_path}': the tokenizer can not be loaded: {loading_problem(error)}")
    set_prompt_format(tokenizer, format_name)
    return tokenizer


def load_model(model_args: ModelArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the base model.

    Args:
        dtype: of the weights; of the matrix products where the weights are 4-bit.
        device: where the weights go; a GPU gets them straight from the file.
    """
    check_model_path(model_args.model_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_path,
            dtype=dtype,
            device_map={"": device} if device.type == "cuda" else None,
            quantization_config=quantization if model_args.load_in_4bit else None,
            use_safetensors=True,  # the other format is pickle, which can run code
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        fail(f"--model_path '{model_args.model_path}': the model can not be loaded: {loading_problem(error)}")
    model.generation_config = GenerationConfig()  # that of Instruct models asks for sampling: see generation.py
    return model


def loading_problem(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which --trust_remote_code True would run: only if you trust its author"
        )
    return first_line(error)


def check_model_path(model_path: str) -> None:
    """Tell a mistyped folder from a hub name before transformers asks the hub for it."""
    path = Path(model_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            fail(f"--model_path '{model_path}' holds no config.json: it is not a checkpoint that transformers can load")
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) or Path(path.parts[0]).exists():
        fail(f"--model_path '{model_path}' does not exist; name the folder of a Qwen checkpoint, or a hub name")


def training_dtype(training_args: TrainingArguments) -> torch.dtype:
    """The dtype of the frozen base weights: float16 only together with fp16's loss scaling (gradients underflow)."""
    return torch.float16 if training_args.fp16 else torch.bfloat16 if training_args.bf16 else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def preprocess_function(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Turn one row into what the model trains on.

    Returns:
        `input_ids`, `attention_mask` and `labels`, of one length, at most `max_length`. `labels` are the input_ids of
        the answers with their stop tokens, and IGNORE_INDEX elsewhere. A row that is too long is cut on the right, and
        then ends without a stop token.
    """
    input_ids, labels = encode_messages(to_messages(row, tokenizer), tokenizer)
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def build_dataset(path: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset | None:
    """Read, check and tokenise a data file, and print how many rows were kept, cut and dropped.

    Returns:
        A dataset with the columns of `preprocess_function` and `row_number`, counted from 1 in the file; None without a
        path. A conversation whose earlier turns the template rewrites gives one row for each answer.
    """
    if path is None:
        return None
    stop_ids = stop_token_ids(tokenizer)
    rows = [(number, part) for number, row in enumerate(load_rows(path), 1) for part in split_turns(row, tokenizer)]
    examples = []
    for number, row in tqdm(rows, desc=f"tokenizing {path}", leave=False):
        example = preprocess_function(row, tokenizer, max_length)
        if any(label != IGNORE_INDEX for label in example["labels"]):
            examples.append(example | {"row_number": number})
    cut = sum(example["labels"][-1] not in stop_ids for example in examples)
    say(
        f"{path}: {len(rows)} rows: {len(examples) - cut} kept whole, {cut} cut at {max_length} tokens, "
        f"{len(rows) - len(examples)} dropped (their answer lies behind the cut)"
    )
    empty = sum(row.get("output") == "" for _, row in rows)
    if empty:
        say(f"{path}: {empty} rows have an empty answer: the model learns to say nothing there")
    if not examples:
        fail(f"{path}: no row is left; raise --max_length (now {max_length})")
    return Dataset.from_list(examples)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Train the adapter, check it, save it, and print what it took and what to try next.

    Args:
        model: the base with a fresh adapter.

    Raises:
        SystemExit: code 1 where the loss is not finite or nothing was learnt, and then no adapter is saved; code 2
            where the run can not be resumed.
    """
    count_trainable(model)
    info = {
        "base_model": model_args.model_path,
        "base_fingerprint": base_fingerprint(model),
        "quantization": "nf4" if model_args.load_in_4bit else None,
        "prompt_format": prompt_format(tokenizer),
        "stop_token_ids": stop_token_ids(tokenizer),
        "labels": labels_by_task(load_rows(data_args.data_path)),
        **describe_run(data_args.data_path),
    }
    files = {TEMPLATE: tokenizer.chat_template, INFO: json.dumps(info, ensure_ascii=False, indent=2) + "\n"}
    say(f"prompt format: {prompt_format(tokenizer)}; the first row, as the model reads it and learns to write it:")
    say(mark_answers(train_dataset[0]["input_ids"], train_dataset[0]["labels"], tokenizer))
    checkpoint = None if data_args.dry_run else find_resume_checkpoint(training_args, model, info)
    pad_token_id = stop_token_ids(tokenizer)[0]
    with memory_advice(training_args, model_args.load_in_4bit, data_args.max_length):
        if data_args.dry_run:
            print_plan(model, pad_token_id, train_dataset, training_args)
            return
        signals = StopOnSignal()
        trainer = make_trainer(model, pad_token_id, training_args, train_dataset, eval_dataset, (signals,))
        trainer.adapter_files = files
        if data_args.overwrite_output_dir and training_args.should_save:
            remove_checkpoints(training_args.output_dir)
            Path(training_args.output_dir, METRICS).unlink(missing_ok=True)
        if training_args.should_save:
            remove_leftovers(training_args.output_dir)
        start = adapter_state(model)
        with fast_steps(trainer):
            result = trainer.train(resume_from_checkpoint=checkpoint)
        signals.exit_if_caught()
    if training_args.should_save:
        save_adapter(model, training_args.output_dir, start, files)
        if not data_args.keep_checkpoints:
            remove_checkpoints(training_args.output_dir)

    tokens_per_row = sum(map(len, train_dataset["input_ids"])) / len(train_dataset)
    tokens_per_second = result.metrics["train_samples_per_second"] * tokens_per_row
    say(
        f"trained in {result.metrics['train_runtime']:.0f} s, {tokens_per_second:,.0f} tokens/s, "
        f"peak memory {peak_memory() / GIB:.2f} GiB; saved in {training_args.output_dir}"
    )
    if eval_dataset and data_args.eval_metrics and training_args.should_save:
        evaluate_answers(model, tokenizer, data_args, training_args)
    say("Try it:")
    say(f'python inference.py --adapter_path {training_args.output_dir} --instruction "翻译为英文" --input "早安"')


def evaluate_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, training_args: TrainingArguments
) -> None:
    """Answer the evaluation rows with the trained adapter, print how good the answers are, and write metrics.json."""
    model.eval()  # no dropout, and no gradient checkpointing, in which generation goes wrong
    rows = load_rows(data_args.eval_data_path)
    prompts = [encode_question(row, tokenizer) for row in rows]
    config = make_generation_config(tokenizer, MAX_NEW_TOKENS)
    predictions: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(rows), desc=f"answering {data_args.eval_data_path}", disable=training_args.disable_tqdm) as bar:
        batch_size = training_args.per_device_eval_batch_size
        for numbers, batch in answer_in_batches(model, tokenizer, prompts, batch_size, config):
            predictions.update(zip(numbers, batch, strict=True))
            bar.update(len(numbers))
    in_order = [predictions[number] for number in range(len(rows))]
    report(rows, in_order, Path(training_args.output_dir, METRICS), data_path=data_args.eval_data_path)


def count_trainable(model: PeftModel) -> None:
    """Print how much of the model is trained, and see to it that this part, and only the adapter, is float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # "Attempting to unscale FP16 gradients" otherwise
    trainable, total = model.get_nb_trainable_parameters()
    if trainable == 0:
        fail("the adapter has no trainable parameters")
    say(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4f}%)")
