"""What the scripts share, in the order a run uses it: load, preprocess, train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from accelerate.utils import broadcast_object_list, disable_fsdp_ram_efficient_loading
from datasets import Dataset
from peft import PeftModel
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
from finetuning.adapter.folder import adapter_state, describe_adapter, save_adapter
from finetuning.cli.arguments import ModelArguments, renamed_fields
from finetuning.cli.memory import memory_advice
from finetuning.generation.evaluate import score_adapter, show_answers
from finetuning.preprocessing.label_words import warn_about_labels
from finetuning.preprocessing.prompts import encode_conversations, pad_token_id, to_messages
from finetuning.preprocessing.rows import Rows, load_rows
from finetuning.preprocessing.summary import Summary, print_summary
from finetuning.preprocessing.templates import set_prompt_format
from finetuning.preprocessing.thoughts import choose_mode, use_of_thoughts, without_thoughts
from finetuning.preprocessing.token_cache import TokenCache
from finetuning.preprocessing.token_dataset import ChunkTokenizer, make_dataset, split_rows
from finetuning.training.callbacks import StopOnSignal
from finetuning.training.checkpoints import (
    check_output_dir,
    clear_output_dir,
    find_resume_checkpoint,
    remove_checkpoints,
    run_settings,
)
from finetuning.training.dry_run import print_plan
from finetuning.training.flags import Arguments
from finetuning.training.hub import create_repository, upload_adapter
from finetuning.training.processes import shards_weights
from finetuning.training.progress import ProgressLog
from finetuning.training.report import (
    describe_run,
    print_first_row,
    print_next_command,
    print_run,
    scoring_command,
    write_report,
)
from finetuning.training.trainer import make_trainer, prepare_adapter


def start_run(args: Arguments) -> None:
    """Refuse an output folder that is in use, and set the seed before anything random is made."""
    only_looks = args.data.dry_run or args.data.show_rows
    allowed = only_looks or args.data.overwrite_output_dir or args.training.resume_from_checkpoint
    if args.training.should_save:
        check_output_dir(args.training.output_dir, allowed=bool(allowed))
    set_seed(args.training.seed)
    if not only_looks:
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
    """Rows to train or evaluate on: their tokens, what is known of them, and what answers are compared with."""

    dataset: Dataset
    summary: Summary
    rows: Rows | None = None  # with their texts; None if they are not to be answered


def preprocess_function(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Turn rows into what the model trains on.

    Args:
        rows: in the form of `schema.read_row`.

    Returns:
        For each row `input_ids` and `labels`, of the same length, at most `max_length`. `labels` are the input_ids of
        the answers with their stop tokens, and IGNORE_INDEX elsewhere. A row that is too long is cut on the right, and
        then ends without a stop token.
    """
    conversations = [to_messages(row, tokenizer) for row in rows]
    return [
        {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
        for input_ids, labels in encode_conversations(conversations, tokenizer)
    ]


def preprocess(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    thinking: str = "auto",
    rename: dict[str, str] | None = None,
    **options: Any,
) -> Data:
    """Read, check and tokenise data files, and print how many rows were kept, cut and dropped.

    Args:
        thinking: "off" leaves the thoughts of the rows out.
        rename: what a field is called here, by what it is called in the files.
        options: those of `make_dataset`.

    Returns:
        A dataset with the columns of `preprocess_function`, `length`, and `row_number`, counted from 1. A conversation
        whose earlier turns the template rewrites gives one example for each answer.
    """
    tokenize_chunk = ChunkTokenizer(preprocess_function, tokenizer, max_length, thinking, rename or {})
    dataset, summary = make_dataset(path, tokenize_chunk, **options)
    print_summary(summary, max_length, use_of_thoughts(tokenizer, thinking))
    return Data(dataset, summary)


def load_data(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Data, Data | None]:
    """The rows to train on, and those to evaluate on: of a file of their own, or a share of the others."""
    data, thinking = args.data, args.data.thinking
    cache = TokenCache(data.token_cache_dir, data.token_cache_gb, args.training.local_process_index == 0)
    options = {"rename": renamed_fields(data), "num_workers": data.preprocessing_num_workers, "cache": cache}
    train = preprocess(data.data_path, tokenizer, data.max_length, thinking, max_rows=data.max_rows, **options)
    if data.eval_split:
        train.dataset, held_out = split_rows(train.dataset, data.eval_split, args.training.seed)
        evaluation, path, numbers = Data(held_out, train.summary), data.data_path, set(held_out["row_number"])
    elif data.eval_data_path:
        path, numbers = data.eval_data_path, None
        evaluation = preprocess(path, tokenizer, data.max_length, thinking, **options)
    else:
        return train, None
    if data.eval_metrics and args.training.should_save:
        evaluation.rows = load_rows(path, rename=renamed_fields(data), numbers=numbers)
        if thinking == "off":
            evaluation.rows[:] = map(without_thoughts, evaluation.rows)
    return train, evaluation


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
    choose_mode(tokenizer, train_data.summary, args.data.thinking)
    warn_about_labels(train_data.summary.labels())
    print_first_row(train_data.dataset, tokenizer)
    if args.data.dry_run:
        print_plan(model, pad_token_id(tokenizer), train_data.dataset, args)
        return
    run = train_and_save(model, tokenizer, train_data, eval_data, args)
    output_dir, scores = args.training.output_dir, ""
    try:
        scores = evaluate(model, tokenizer, train_data, eval_data, args)
    finally:  # also if memory runs out in the evaluation, or the user stops it
        if args.training.should_save:
            write_report(run, scores, output_dir)
    upload_adapter(args.training)
    print_next_command(output_dir)


def train_and_save(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train_data: Data, eval_data: Data | None, args: Arguments
) -> dict[str, Any]:
    """Train, from a checkpoint if asked to; save the adapter if it passes its checks; return what the run was."""
    output_dir = args.training.output_dir
    files = describe_adapter(model, tokenizer, train_data.summary, run_settings(args))
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
    trainer.add_callback(ProgressLog(trainer, args))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    signals.exit_if_caught()

    state = adapter_state(model)
    if args.training.should_save:
        save_adapter(model, state, output_dir, start, files)
        if not args.data.keep_checkpoints:
            remove_checkpoints(output_dir)
    run = describe_run(trainer, result.metrics, checkpoint, train_data.summary, args)
    print_run(run, output_dir)
    return run


def evaluate(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train_data: Data, eval_data: Data | None, args: Arguments
) -> str:
    """Score the adapter's answers to the evaluation rows, and show a few; returns the scores, "" if there are none."""
    rows, count = eval_data.rows if eval_data else None, args.data.sample_answers
    if not args.training.should_save or not (rows or count):
        return ""
    command = scoring_command(args.training.output_dir, rows.path if rows else args.data.data_path)
    if shards_weights(args.training):
        say(f"no answers, as the model is divided; for them: {command}")
        return ""
    model.eval()  # no dropout, and no gradient checkpointing, which breaks generation
    place = "after the adapter was saved, while answering rows"
    with memory_advice(args.training.device, [f"{command} --batch_size 1"], place):
        labels = train_data.summary.labels()
        scores = score_adapter(model, tokenizer, rows, labels, args.training) if rows else ""
        if count:
            show_answers(model, tokenizer, (eval_data or train_data).dataset, count)
    return scores
