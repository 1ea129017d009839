"""What the scripts share, in the order a run uses it: load, preprocess, train."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from accelerate.utils import broadcast_object_list, disable_fsdp_ram_efficient_loading
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from finetuning.adapter.base_model import (
    check_loaded_weights,
    check_model_path,
    explain_loading_error,
    four_bit_flag,
    loading_report,
    quantization_options,
)
from finetuning.adapter.fingerprint import quantization
from finetuning.adapter.folder import METRICS, adapter_state, describe_adapter, save_adapter
from finetuning.cli.arguments import ModelArguments
from finetuning.cli.memory import memory_advice
from finetuning.generation.evaluate import answer_rows
from finetuning.generation.generate import make_generation_config
from finetuning.generation.metrics import report
from finetuning.generation.predictions import Predictions
from finetuning.preprocessing.label_words import labels_by_task, warn_about_labels
from finetuning.preprocessing.prompts import (
    IGNORE_INDEX,
    encode_messages,
    pad_token_id,
    split_turns,
    stop_token_ids,
    to_messages,
)
from finetuning.preprocessing.rows import Rows, load_rows
from finetuning.preprocessing.summary import print_summary
from finetuning.preprocessing.templates import set_prompt_format
from finetuning.preprocessing.thoughts import choose_mode, keep_or_remove_thoughts
from finetuning.training.callbacks import StopOnSignal
from finetuning.training.checkpoints import (
    RUN_SETTINGS,
    check_output_dir,
    clear_output_dir,
    find_resume_checkpoint,
    remove_checkpoints,
)
from finetuning.training.dry_run import print_plan
from finetuning.training.flags import Arguments
from finetuning.training.hub import create_repository, upload_adapter
from finetuning.training.processes import engine_asked_for, shards_weights
from finetuning.training.report import print_first_row, print_next_command, print_speed, scoring_command
from finetuning.training.trainer import make_trainer, prepare_adapter


def start_run(args: Arguments) -> None:
    """Refuse an output folder that is in use, and set the seed before anything random is made."""
    allowed = args.data.overwrite_output_dir or args.training.resume_from_checkpoint or args.data.dry_run
    if args.training.should_save:
        check_output_dir(args.training.output_dir, allowed=bool(allowed))
    set_seed(args.training.seed)
    if not args.data.dry_run:
        create_repository(args.training)


# ----------------------------------------------------------------------------------------------------------------------
# Load
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments, format_name: str) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with the chat template of the format `auto`, `chat` or `plain`."""
    check_model_path(model_args.model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_path, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"--model_path '{model_args.model_path}': the tokenizer cannot be loaded: {explain_loading_error(error)}")
    set_prompt_format(tokenizer, format_name)
    return tokenizer


def load_model(
    model_args: ModelArguments, dtype: torch.dtype, device: torch.device, sharded: bool = False
) -> PreTrainedModel:
    """Load the base model, and refuse it if any of its weights is not in the checkpoint.

    Args:
        dtype: of the weights; with 4-bit weights, of the matrix products.
        device: of the weights; a GPU gets them straight from the file.
        sharded: whether FSDP or ZeRO-3 divides the weights over several GPUs later. Then they go into main memory, as
            none of the GPUs may have room for all; but 4-bit weights, a quarter of the size, are made on each GPU.
    """
    check_model_path(model_args.model_path)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for every length of row
    try:
        config = AutoConfig.from_pretrained(model_args.model_path, trust_remote_code=model_args.trust_remote_code)
        remedies = four_bit_flag(config, model_args.load_in_4bit)
        quantized = quantization_options(config, model_args.load_in_4bit, dtype, sharded)
        if quantized and sharded:
            disable_fsdp_ram_efficient_loading()  # accelerate cannot hand 4-bit weights out
        with memory_advice(device, remedies, "while loading the model"), loading_report():
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                model_args.model_path,
                dtype=dtype,
                device_map={"": device} if device.type == "cuda" and (quantized or not sharded) else None,
                use_safetensors=True,  # the other format is pickle, which can run code
                trust_remote_code=model_args.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in loading_info
                **quantized,
            )
    except (OSError, ValueError, ImportError) as error:
        fail(f"--model_path '{model_args.model_path}': the model cannot be loaded: {explain_loading_error(error)}")
    check_loaded_weights(model_args.model_path, config, model, loading_info)
    if Path(model_args.model_path).is_dir():  # an adapter names its base model, from whichever folder it is used
        model.name_or_path = str(Path(model_args.model_path).resolve())
    if not quantization(model):
        model.to(dtype)  # what stands beside FP8 weights comes in the dtype of the file
    model.generation_config = GenerationConfig()  # that of Instruct models asks for sampling: see generate.py
    return model


def training_dtype(training_args: TrainingArguments) -> torch.dtype:
    """The dtype of the frozen base weights: float16 only together with fp16's loss scaling (gradients underflow)."""
    return torch.float16 if training_args.fp16 else torch.bfloat16 if training_args.bf16 else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Preprocess
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """A data file, read once: its rows, and the dataset that the model trains on."""

    rows: Rows
    dataset: Dataset


def preprocess_function(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Turn one row into what the model trains on.

    Returns:
        `input_ids`, `attention_mask` and `labels`, all of the same length, at most `max_length`. `labels` are the
        input_ids of the answers with their stop tokens, and IGNORE_INDEX elsewhere. A row that is too long is cut on
        the right, and then ends without a stop token.
    """
    input_ids, labels = encode_messages(to_messages(row, tokenizer), tokenizer)
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def preprocess(
    path: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int, thinking: str = "auto"
) -> Data | None:
    """Read, check and tokenise a data file, and print how many rows were kept, cut and dropped.

    Args:
        thinking: "off" leaves the thoughts of the rows out.

    Returns:
        The rows, and a dataset with the columns of `preprocess_function` and `row_number`, counted from 1 in the file.
        A conversation whose earlier turns the template rewrites gives one example for each answer. None without a path.
    """
    if path is None:
        return None
    rows = load_rows(path)
    keep_or_remove_thoughts(rows, tokenizer, thinking)
    examples, counts, stop_ids = [], Counter(), stop_token_ids(tokenizer)
    for number, row in enumerate(tqdm(rows, desc=f"tokenizing {path}", leave=False), 1):
        parts = [preprocess_function(part, tokenizer, max_length) for part in split_turns(row, tokenizer)]
        learnt = [part for part in parts if any(label != IGNORE_INDEX for label in part["labels"])]
        examples += [part | {"row_number": number} for part in learnt]
        whole = all(part["input_ids"][-1] in stop_ids for part in parts)
        counts["dropped" if not learnt else "whole" if whole else "cut"] += 1
    print_summary(rows, counts, len(examples), max_length)
    return Data(rows, Dataset.from_list(examples))


# ----------------------------------------------------------------------------------------------------------------------
# Train
# ----------------------------------------------------------------------------------------------------------------------


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train_data: Data, eval_data: Data | None, args: Arguments
) -> None:
    """Train the adapter, check it, save it, and print what it took and what to try next.

    Args:
        model: the base with a fresh adapter.

    Raises:
        SystemExit: code 1 if the loss is not finite or nothing was learnt, and then no adapter is saved; code 2 if the
            run cannot be resumed.
    """
    prepare_adapter(model)
    choose_mode(tokenizer, train_data.rows, args.data.thinking)
    warn_about_labels(train_data.rows)
    print_first_row(train_data.dataset, tokenizer)
    if args.data.dry_run:
        print_plan(model, pad_token_id(tokenizer), train_data.dataset, args)
        return
    train_and_save(model, tokenizer, train_data, eval_data, args)
    output_dir = args.training.output_dir
    if eval_data and args.data.eval_metrics and shards_weights(args.training):
        say(f"no scores, as the model is divided; for them: {scoring_command(output_dir, eval_data.rows.path)}")
    elif eval_data and args.data.eval_metrics and args.training.should_save:
        evaluate(model, tokenizer, eval_data.rows, labels_by_task(train_data.rows), args.training)
    upload_adapter(args.training)
    print_next_command(output_dir)


def train_and_save(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train_data: Data, eval_data: Data | None, args: Arguments
) -> None:
    """Train, from a checkpoint if asked to; then save the adapter if it passes its checks, and print the speed."""
    output_dir = args.training.output_dir
    settings = {"max_length": args.data.max_length, "thinking": args.data.thinking}
    settings |= {name: getattr(args.training, name) for name in RUN_SETTINGS}
    settings |= {"processes": args.training.world_size, "engine": engine_asked_for(args.training)}
    files = describe_adapter(model, tokenizer, train_data.rows, settings)
    checkpoint = None
    if args.training.should_save:
        checkpoint = find_resume_checkpoint(output_dir, args.training.resume_from_checkpoint, model, files)
        clear_output_dir(output_dir, args.data.overwrite_output_dir)
    (checkpoint,) = broadcast_object_list([checkpoint])
    start = adapter_state(model)

    signals = StopOnSignal()
    eval_dataset = eval_data.dataset if eval_data else None
    pad_id = pad_token_id(tokenizer)
    trainer = make_trainer(model, pad_id, args.training, train_data.dataset, eval_dataset, files, (signals,))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    signals.exit_if_caught()

    state = adapter_state(model)
    if args.training.should_save:
        save_adapter(model, state, output_dir, start, files)
        if not args.data.keep_checkpoints:
            remove_checkpoints(output_dir)
    resumed_at = int(Path(checkpoint).name.split("-")[1]) if checkpoint else 0
    share = 1 - resumed_at / result.global_step
    print_speed(result.metrics, share, train_data.dataset, output_dir, args.training.device)


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: dict[str, list[str]],
    args: TrainingArguments,
) -> None:
    """Answer the evaluation rows with the trained adapter, print how good the answers are, and write metrics.json."""
    model.eval()  # no dropout, and no gradient checkpointing, which breaks generation
    predictions, config = Predictions(None, {}), make_generation_config(tokenizer)
    command = f"{scoring_command(args.output_dir, rows.path)} --batch_size 1"
    batch_size, place = args.per_device_eval_batch_size, f"after the adapter was saved, while answering {rows.path}"
    with memory_advice(args.device, [command], place):
        answer_rows(model, tokenizer, rows, predictions, batch_size, config, disable_tqdm=args.disable_tqdm)
    report(rows, predictions.in_order(), labels, Path(args.output_dir, METRICS), data_path=rows.path)
