"""Measure fine-tuning methods on your own machine: trainable parameters, memory, speed.

    python benchmark.py                                     # models/tiny-qwen, in a few minutes on a laptop
    python benchmark.py --model_path path/to/qwen --baseline True
    python benchmark.py --shape qwen2.5-7b --sequence_length 1024 --batch_size 1

Each method trains in a process of its own, through the code of the training scripts. The result is a Markdown table, a
JSON file and a bar chart. With --shape the weights are random: nothing is downloaded, and the speed is the same.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say, warn  # before peft, whose import is noisy

# isort: split
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from benchmarking.baselines import make_stock_trainer, make_trl_trainer
from benchmarking.child import run_child
from benchmarking.flags import BenchmarkArguments, memory_flags
from benchmarking.meters import Stopwatch, TokenCounter, count_products, measure_machine
from benchmarking.pages import find_pages
from benchmarking.shapes import make_random_checkpoint, random_rows
from benchmarking.table import ALL, Method, choose_methods, save_results, show_results
from common import load_data, load_model, load_tokenizer, start_run
from finetuning.cli.arguments import ModelArguments, ScriptParser
from finetuning.cli.memory import GIB, memory_advice, peak_memory, peak_reserved, total_memory
from finetuning.preprocessing.encode import pad_token_id
from finetuning.training.flags import Arguments, parse_arguments
from finetuning.training.trainer import make_trainer, prepare_adapter
from train_lora import LoraArguments, build_lora_config
from train_prompt_tuning import PromptTuningArguments, add_soft_prompt

# The flags of each kind of method. Dropout would make the losses of two trainers differ.
METHOD_FLAGS = {
    "full": (LoraArguments, "--learning_rate 1e-5"),
    "lora": (LoraArguments, "--learning_rate 3e-4 --lora_dropout 0"),
    "prompt_tuning": (PromptTuningArguments, "--learning_rate 3e-2 --num_virtual_tokens 20"),
}


def measure(args: BenchmarkArguments, model_path: str) -> dict[str, Any]:
    """Train with the method `args.only`; returns its figures."""
    method = ALL[args.only]
    with tempfile.TemporaryDirectory() as folder:
        run = training_arguments(args, method, model_path, f"{folder}/out")
        device = run.training.device
        if args.memory_cap and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(args.memory_cap * GIB / total_memory(device), device)
        start_run(run)
        tokenizer = load_tokenizer(run.model, run.data.prompt_format)
        if args.sequence_length:
            dataset = random_rows(args.batch_size * (args.warmup_steps + args.steps), args.sequence_length)
        else:
            dataset = load_data(run, tokenizer)[0].dataset
        model = load_model(run.model, run.dtype, device)
        products = count_products(model)
        with memory_advice(device, memory_flags(args)):
            trainer = build_trainer(method, model, tokenizer, run, dataset)
            stopwatch = Stopwatch(args.warmup_steps)
            trainer.add_callback(stopwatch)
            trainer.remove_callback(PrinterCallback)
            trainer.data_collator = counter = TokenCounter(trainer.data_collator)
            trainer.train()

    measured = counter.batches[args.warmup_steps :][: args.steps]
    tokens, supervised = (sum(numbers) for numbers in zip(*measured, strict=True))
    virtual = run.method.num_virtual_tokens * args.batch_size * args.steps if method.kind == "prompt_tuning" else 0
    factor = 6 if method.kind == "full" else 4  # forward, gradient of activations and, if trained, of weights
    operations = factor * (products["layers"] * (tokens + virtual) + products["head"] * supervised)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    adapter = 0 if method.kind == "full" else trainable
    return {
        "method": args.only,
        "precision": "nf4" if method.load_in_4bit else str(run.dtype).removeprefix("torch."),
        "trainable": trainable,
        "trainable_percent": 100 * trainable / (products["parameters"] + adapter),
        "peak_gib": peak_reserved(device) / GIB,  # what the process takes, as nvidia-smi shows it
        "peak_allocated_gib": peak_memory(device) / GIB,  # by tensors
        "steps": args.steps,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": stopwatch.seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "tokens_per_second": tokens / stopwatch.seconds,
        "supervised_tokens_per_second": supervised / stopwatch.seconds,
        "operations_per_second": operations / stopwatch.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def training_arguments(args: BenchmarkArguments, method: Method, model_path: str, output_dir: str) -> Arguments:
    """The command line of a training run, as the training scripts would parse it."""
    method_arguments, method_flags = METHOD_FLAGS[method.kind]
    pure_bf16 = method.kind == "full" and torch.cuda.is_available()  # float32 weights and states: 16 bytes a parameter
    words = ["--model_path", model_path, "--data_path", args.data_path, "--output_dir", output_dir]
    words += f"--per_device_train_batch_size {args.batch_size} --max_steps {args.warmup_steps + args.steps}".split()
    words += f"--gradient_checkpointing {args.gradient_checkpointing} --load_in_4bit {method.load_in_4bit}".split()
    words += "--save_strategy no --logging_steps 1 --dataloader_num_workers 0".split()
    words += ["--bf16", str(args.bf16 or pure_bf16), *method_flags.split()]
    run = parse_arguments(method_arguments, None, words)
    run.training.remove_unused_columns = True  # for the stock Trainer
    return run


def build_trainer(
    method: Method, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Arguments, dataset: Dataset
) -> Trainer:
    """Give the model its adapter, and build the trainer that the method names."""
    if method.trainer == "trl":
        return make_trl_trainer(model, tokenizer, build_lora_config(run.method, model), run.training, dataset)
    if method.kind == "lora":
        model = get_peft_model(model, build_lora_config(run.method, model))
    elif method.kind == "prompt_tuning":
        model = add_soft_prompt(model, tokenizer, run.method)
    if isinstance(model, PeftModel):
        prepare_adapter(model)
    if method.trainer == "ours":
        return make_trainer(model, pad_token_id(tokenizer), run.training, dataset)
    return make_stock_trainer(model, tokenizer, run.training, dataset)


def measure_in_child(args: BenchmarkArguments, model_path: str, method: str) -> dict[str, Any] | str:
    """Do what --only names in a fresh process; returns its figures or, if it fails, the reason."""
    words = [__file__, "--only", method, "--model_path", model_path]
    for name, value in asdict(args).items():
        if value is not None and name not in ("only", "report"):
            words += [f"--{name}", str(value)]
    return run_child(words)


def main() -> None:
    model_args, args = ScriptParser((ModelArguments, BenchmarkArguments), __doc__).parse()
    if args.only == "weights":
        print(json.dumps(make_random_checkpoint(args.shape, args.layers, model_args.model_path)))
    elif args.only:
        print(json.dumps(measure_machine() if args.only == "machine" else measure(args, model_args.model_path)))
    else:
        compare(args, model_args.model_path)


def compare(args: BenchmarkArguments, model_path: str) -> None:
    """Measure the methods one after the other, keep each result as it comes, then show them side by side."""
    pages = find_pages(args.report, "benchmark")
    if not args.shape:
        load_tokenizer(ModelArguments(model_path=model_path), "auto")  # a wrong path fails here, in one line
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    results, failures = {}, {}
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        if args.shape:
            say(f"making random weights of {args.shape}")
            model_path = folder
            failure = measure_in_child(args, folder, "weights")
            if failure:
                fail(f"the random weights could not be made: {failure}", 1)
        machine = measure_in_child(args, model_path, "machine")
        if isinstance(machine, str):
            fail(f"the speed of this machine could not be measured: {machine}", 1)
        run = machine | {"model": args.shape or model_path, "arguments": asdict(args)}
        for name in choose_methods(args.methods, args.baseline):
            say(f"measuring {ALL[name].title}")
            result = measure_in_child(args, model_path, name)
            if isinstance(result, str):
                failures[name] = result
                advice = f"\nTry, in this order: {'; '.join(memory_flags(args))}" if "out of memory" in result else ""
                warn(f"{name} was not measured: {result}{advice}")
            else:
                results[name] = result
            save_results(args.output_dir, run, results, failures)
    if not results:
        fail("no method could be measured", 1)
    show_results(run, results, args.output_dir, pages)


if __name__ == "__main__":
    main()
