"""What the scripts share, in the order a run uses it: load, preprocess, train."""

from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, disable_fsdp_ram_efficient_loading
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from finetuning.cli.arguments import ModelArguments
from finetuning.cli.commands import inference_command
from finetuning.cli.memory import memory_advice
from finetuning.generation.evaluate import evaluate
from finetuning.generation.labels import labels_of_tasks, warn_about_labels
from finetuning.model import base_model, folder
from finetuning.model.fingerprint import base_fingerprint, quantization
from finetuning.model.hub import upload
from finetuning.preprocessing.dataset import Data, load_training_data
from finetuning.preprocessing.encode import encode, pad_token_id, to_messages
from finetuning.preprocessing.files import DataError
from finetuning.preprocessing.templates import set_prompt_format
from finetuning.training import checkpoints
from finetuning.training.callbacks import StopOnSignal
from finetuning.training.collators import row_lengths
from finetuning.training.dry_run import Rehearsal, print_plan
from finetuning.training.flags import Arguments, check_batches, memory_flags
from finetuning.training.progress import ProgressLog
from finetuning.training.report import describe_run, print_first_row, print_run, warn_about_positions, write_report
from finetuning.training.trainer import make_trainer, prepare_adapter


def start_run(args: Arguments) -> None:
    """Refuse an output folder that is in use, and set the seed before anything random is made."""
    if args.training.should_save:
        checkpoints.prepare_output_dir(args)
    set_seed(args.training.seed)


# ---- load


def load_tokenizer(
    model_args: ModelArguments, format_name: str | None, adapter_path: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, or that of an adapter which has its own, with the chat template of a format.

    Args:
        format_name: `auto`, `chat` or `plain`; None: as the adapter was trained or, if nothing says how, `auto`.
    """
    base_model.check_model_path(model_args.model_path)
    tokenizer = base_model.read_tokenizer(model_args.model_path, model_args.trust_remote_code)
    if adapter_path:
        tokenizer = folder.own_tokenizer(adapter_path, model_args.trust_remote_code, tokenizer)
    base_model.check_vocabulary(tokenizer, model_args.model_path)
    set_prompt_format(tokenizer, format_name or "auto")
    if adapter_path and not format_name:
        folder.use_trained_format(tokenizer, adapter_path)
    return tokenizer


def load_model(
    model_args: ModelArguments, dtype: torch.dtype, device: torch.device, sharded: bool = False
) -> PreTrainedModel:
    """Load the base model, and refuse it if any of its weights is not in the checkpoint.

    Args:
        dtype: of the weights; with 4-bit weights, of the matrix products.
        device: of the weights; a GPU gets them straight from the file.
        sharded: whether FSDP or ZeRO-3 shards the weights over several GPUs later. Then they go into main memory, as
            they may not fit on any GPU; but 4-bit weights, a quarter of the size, are made on each GPU.
    """
    base_model.check_model_path(model_args.model_path)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for every length of row
    try:
        config = AutoConfig.from_pretrained(model_args.model_path, trust_remote_code=model_args.trust_remote_code)
        remedies = base_model.four_bit_flag(config, model_args.load_in_4bit)
        quantized = base_model.quantization_options(config, model_args.load_in_4bit, dtype, sharded)
        if quantized and sharded:
            disable_fsdp_ram_efficient_loading()  # accelerate cannot broadcast 4-bit weights
        with memory_advice(device, remedies, "while loading the model"), base_model.loading_report():
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
    except Exception as error:  # transformers takes the fields of a configuration as they are
        reason = base_model.explain_loading_error(error)
        fail(f"--model_path '{model_args.model_path}': the model cannot be loaded: {reason}")
    base_model.check_loaded_weights(model_args.model_path, config, model, loading_info)
    if Path(model_args.model_path).is_dir():  # an adapter names its base model, from whichever folder it is used
        model.name_or_path = str(Path(model_args.model_path).resolve())
    if not quantization(model):
        model.to(dtype)  # what stands beside FP8 weights comes in the dtype of the file
    model.fingerprint = base_fingerprint(model)  # before an adapter changes it
    model.generation_config = GenerationConfig()  # that of Instruct models asks for sampling: see generate.py
    return model


# ---- preprocess


def preprocess_function(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Turn a row of the data into what the model trains on.

    Args:
        row: in the form of `rows.normalize_row`: all fields that the file gives it, or `messages`.

    Returns:
        One example, or several if the chat template rewrites earlier turns: `input_ids` and, of the same length,
        `labels`, which are the input_ids of the answers with their stop tokens, and IGNORE_INDEX elsewhere. Nothing is
        truncated: that is the caller's part.
    """
    messages = to_messages(row, tokenizer)  # for another task, build other turns from the fields of the row
    return encode(messages, tokenizer)


def load_data(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Data, Data | None]:
    """The rows to train on, and those to evaluate on, if there are any."""
    try:
        train_data, eval_data = load_training_data(args.data, preprocess_function, tokenizer, args.training.seed)
    except DataError as error:
        fail(str(error))
    check_batches(len(train_data.dataset), args.training)
    return train_data, eval_data


# ---- train


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Data,
    eval_data: Data | None,
    args: Arguments,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train the adapter, check it, save it, and print what it took and what to try next.

    Args:
        model: the base with a fresh adapter.
        optimizer: of the method; None for that of `--optim`.

    Raises:
        SystemExit: code 1 if the loss is not finite or the adapter is unchanged, and then none is saved; code 2 if the
            run cannot be resumed.
    """
    prepare_adapter(model)
    folder.choose_thinking(tokenizer, train_data.summary, args.data.thinking)
    warn_about_labels(train_data.summary)
    warn_about_positions(train_data.dataset, model.config.get_text_config())
    print_first_row(train_data.dataset, tokenizer)
    if args.run.dry_run:
        print_plan(model, pad_token_id(tokenizer), train_data.dataset, args)
        return
    run = train_and_save(model, tokenizer, train_data, eval_data, args, optimizer)
    if not args.training.should_save:  # of several processes one does the rest
        return
    output_dir, scores = args.training.output_dir, ""
    try:
        shown = args.run.eval_metrics, args.run.sample_answers
        scores = evaluate(model, tokenizer, train_data, eval_data, *shown, args.training)
    finally:  # also if memory runs out in the evaluation, or the user stops it
        write_report(run, scores, output_dir)
    if args.push_to_hub:
        upload(output_dir, args.training.hub_model_id, args.training.hub_token)
    say(f'\nTry it:\n{inference_command(output_dir)} --instruction "翻译为英文" --input "早安"')


def train_and_save(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Data,
    eval_data: Data | None,
    args: Arguments,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """Train, from a checkpoint if asked to; save the adapter if it passes its checks; return what the run was."""
    output_dir, labels = args.training.output_dir, labels_of_tasks(train_data.summary)
    files = folder.describe_adapter(model, tokenizer, train_data.summary, labels, checkpoints.run_settings(args))
    checkpoint = None
    if args.training.should_save:
        checkpoint = checkpoints.find_resume_checkpoint(output_dir, args.training.resume_from_checkpoint, model, files)
        checkpoints.clear_output_dir(output_dir, args.run.overwrite_output_dir, checkpoints.saved_step(checkpoint))
    (checkpoint,) = broadcast_object_list([checkpoint])
    resumed_at = checkpoints.saved_step(checkpoint)
    start = folder.adapter_state(model)

    remedies = list(memory_flags(args, max(row_lengths(train_data.dataset))).values())
    signals, log = StopOnSignal(), ProgressLog()
    callbacks = (signals, checkpoints.CheckpointWriter(files, args.save_total_limit))
    datasets = train_data.dataset, eval_data.dataset if eval_data else None
    trainer = make_trainer(model, pad_token_id(tokenizer), args.training, *datasets, callbacks, optimizer)
    trainer.add_callback(Rehearsal(trainer, remedies))  # before the first step
    trainer.add_callback(log)
    with memory_advice(args.training.device, remedies):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    signals.exit_if_caught()

    state = folder.adapter_state(model)
    PartialState().wait_for_everyone()  # another process may still read the best checkpoint
    if args.training.should_save:
        folder.save_adapter(model, state, output_dir, start, files)
        if not args.run.keep_checkpoints:
            checkpoints.remove_checkpoints(output_dir)
    run = describe_run(trainer, result.metrics["train_runtime"], log.seconds, resumed_at, train_data.summary, args)
    print_run(run, output_dir)
    return run
