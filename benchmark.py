"""Measure fine-tuning methods on your own machine: trainable parameters, memory, speed.

    python benchmark.py                                     # models/tiny-qwen, in a few minutes on a laptop
    python benchmark.py --model_path path/to/qwen --baseline True
    python benchmark.py --shape qwen2.5-7b --sequence_length 1024 --batch_size 1

Each method trains in a process of its own, through the code of the training scripts. The result is a Markdown table, a
JSON file and a bar chart. With --shape the weights are random: nothing is downloaded, and the speed is the same.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from common import load_model, load_tokenizer, prepare_adapter, preprocess, start_run, training_dtype
from finetuning.benchmarking.baselines import make_stock_trainer, make_trl_trainer
from finetuning.benchmarking.meters import Stopwatch, TokenCounter, count_products, matrix_product_rate
from finetuning.benchmarking.shapes import SHAPES, make_random_checkpoint, random_rows
from finetuning.benchmarking.table import ALL, BASELINES, METHODS, Method, check_losses, save_results
from finetuning.cli.arguments import ModelArguments, ScriptParser, beside_scripts, flag
from finetuning.cli.console import fail, say, warn
from finetuning.cli.memory import GIB, peak_reserved
from finetuning.preprocessing.prompts import pad_token_id
from finetuning.training.flags import Arguments, parse_arguments
from finetuning.training.trainer import make_trainer
from train_lora import LoraArguments, build_lora_config
from train_prompt_tuning import PromptTuningArguments, add_soft_prompt

# The flags of each kind of method. Dropout would make the losses of two trainers differ.
METHOD_FLAGS = {
    "full": (LoraArguments, "--learning_rate 1e-5"),
    "lora": (LoraArguments, "--learning_rate 3e-4 --lora_dropout 0"),
    "prompt_tuning": (PromptTuningArguments, "--learning_rate 3e-2 --num_virtual_tokens 20"),
}


@dataclass
class BenchmarkArguments:
    _argument_group_name = "benchmark"

    shape: str | None = flag(None, "random weights of a released shape instead of --model_path", choices=list(SHAPES))
    layers: int | None = flag(None, "only so many layers of the shape")
    data_path: str = flag(beside_scripts("data/train.json"), "rows to train on")
    sequence_length: int | None = flag(
        None, "random rows of so many tokens, all of them learnt, instead of --data_path"
    )
    methods: str = flag(",".join(METHODS), f"of {', '.join(ALL)}")
    baseline: bool = flag(False, "also the stock Trainer with padding and, if trl is installed, TRL")
    batch_size: int = flag(8, "rows a step")
    warmup_steps: int = flag(2, "steps before the measurement")
    steps: int = flag(20, "measured steps")
    gradient_checkpointing: bool = flag(False, "as in training")
    bf16: bool = flag(False, "on a GPU: bfloat16 instead of float16")
    memory_cap: float | None = flag(None, "GiB of the GPU that a method may use")
    output_dir: str = flag("outputs/benchmark", "folder for benchmark.json and .png")
    only: str | None = flag(None, "measure this method in this process, and print JSON")

    def __post_init__(self) -> None:
        unknown = set(self.methods.split(",")) - set(ALL)
        if unknown:
            raise ValueError(f"--methods {','.join(sorted(unknown))}: choose from {', '.join(ALL)}")
        for name in ("batch_size", "steps", "sequence_length", "layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.layers and not self.shape:
            raise ValueError("--layers cuts a --shape: name one of " + ", ".join(SHAPES))


def measure(args: BenchmarkArguments, model_path: str) -> dict[str, Any]:
    """Train with the method `args.only`; returns its figures."""
    method = ALL[args.only]
    if args.memory_cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_cap * GIB / total)
    with tempfile.TemporaryDirectory() as folder:
        run = training_arguments(args, method, model_path, f"{folder}/out")
        start_run(run)
        tokenizer = load_tokenizer(run.model, run.data.prompt_format)
        if args.sequence_length:
            dataset = random_rows(args.batch_size * (args.warmup_steps + args.steps), args.sequence_length)
        else:
            dataset = preprocess(args.data_path, tokenizer, run.data.max_length).dataset
        model = load_model(run.model, training_dtype(run.training), run.training.device)
        products = count_products(model)
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
        "precision": "nf4" if method.load_in_4bit else str(training_dtype(run.training)).removeprefix("torch."),
        "trainable": trainable,
        "trainable_percent": 100 * trainable / (products["parameters"] + adapter),
        "peak_gib": peak_reserved(run.training.device) / GIB,
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
    words += "--save_strategy no --logging_steps 1 --dataloader_num_workers 0 --remove_unused_columns True".split()
    words += ["--bf16", str(args.bf16 or pure_bf16), *method_flags.split()]
    return parse_arguments(method_arguments, None, words)


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


def run_child(args: BenchmarkArguments, model_path: str, method: str) -> dict[str, Any] | None:
    """Measure one method in a fresh process; returns None if it fails, for example for lack of memory."""
    words = [sys.executable, __file__, "--only", method, "--model_path", model_path]
    for name, value in asdict(args).items():
        if value is not None and name not in ("only", "shape", "layers"):
            words += [f"--{name}", str(value)]
    result = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        warn(f"{method} was not measured: {result.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = ScriptParser((ModelArguments, BenchmarkArguments), __doc__)
    model_args, args = parser.to_dataclasses(parser.parse_flags())
    if args.only:
        result = {"rate": matrix_product_rate()} if args.only == "rate" else measure(args, model_args.model_path)
        print(json.dumps(result))
        return
    methods = args.methods.split(",")
    if args.baseline:
        methods += [name for name in BASELINES if name not in methods]
        if not find_spec("trl"):
            methods.remove("lora_trl")
            warn("TRL is not installed, so it is left out: pip install trl")
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            say(f"making random weights of {args.shape}")
            make_random_checkpoint(args.shape, args.layers, folder)
            torch.cuda.empty_cache()
        model_path = folder if args.shape else model_args.model_path
        load_tokenizer(ModelArguments(model_path=model_path), "auto")  # a wrong path fails here, in one line
        rate = run_child(args, model_path, "rate")["rate"]
        results = {}
        for name in methods:
            say(f"measuring {ALL[name].title}")
            result = run_child(args, model_path, name)
            if result:
                results[name] = result
    if not results:
        fail("no method could be measured", 1)
    check_losses(results)
    save_results(args.output_dir, args.shape or model_args.model_path, rate, asdict(args), results)


if __name__ == "__main__":
    main()
