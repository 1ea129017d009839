"""Measure fine-tuning methods on your own machine: trainable parameters, memory, speed.

    python benchmark.py                                     # models/tiny-qwen, in a few minutes on a laptop
    python benchmark.py --model_path path/to/qwen --baseline True
    python benchmark.py --shape qwen2.5-7b --sequence_length 1024 --batch_size 1

Each method trains in a process of its own, through the code of the training scripts. It prints a Markdown table, and
writes it as JSON and as a bar chart. With --shape the weights are random: no download, and the speed is the same.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, PeftModelForCausalLM, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from arguments import ModelArguments, ScriptParser, parse_arguments
from collators import IGNORE_INDEX
from common import build_dataset, count_trainable, load_model, load_tokenizer, training_dtype
from console import fail, say, warn
from memory import GIB, peak_memory
from prompts import stop_token_ids
from train_lora import LoraArguments, build_lora_config
from train_prompt_tuning import PromptTuningArguments, add_soft_prompt
from trainer import fast_steps, make_trainer

# What each method is called in the table. A baseline trains the same adapter with other code.
METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "lora_4bit": "LoRA, 4-bit",
    "prompt_tuning": "prompt tuning",
    "prompt_tuning_4bit": "prompt tuning, 4-bit",
}
BASELINES = {
    "lora_stock": "LoRA, stock Trainer, padded",
    "prompt_tuning_stock": "prompt tuning, stock Trainer, padded",
    "lora_trl": "LoRA, TRL SFTTrainer",
}

# Sizes of released models, from their config.json on the Hugging Face hub.
SHAPES = {
    name: dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "vocab_size", "tie_word_embeddings"), sizes, strict=True))
    for name, sizes in {
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
        "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
        "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
        "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, True),
        "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
        "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
    }.items()
}  # fmt: skip
TOKENIZER = "models/tiny-qwen"  # for a shape: its ids are in every vocabulary

LARGEST_DIFFERENCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}  # of a step's loss


@dataclass
class BenchmarkArguments:
    _argument_group_name = "benchmark"

    shape: str | None = field(
        default=None,
        metadata={"help": "random weights of a released shape instead of --model_path", "choices": list(SHAPES)},
    )
    layers: int | None = field(default=None, metadata={"help": "only so many layers of the shape"})
    data_path: str = field(default="data/train.json", metadata={"help": "rows to train on"})
    sequence_length: int | None = field(
        default=None, metadata={"help": "random rows of so many tokens, all of them learnt, instead of --data_path"}
    )
    methods: str = field(default=",".join(METHODS), metadata={"help": f"of {', '.join(METHODS | BASELINES)}"})
    baseline: bool = field(
        default=False, metadata={"help": "also the stock Trainer with padding and, where trl is installed, TRL"}
    )
    batch_size: int = field(default=8, metadata={"help": "rows a step"})
    warmup_steps: int = field(default=2, metadata={"help": "steps before the measurement"})
    steps: int = field(default=20, metadata={"help": "measured steps"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "as in training"})
    bf16: bool = field(default=False, metadata={"help": "on a GPU: bfloat16 instead of float16"})
    memory_cap: float | None = field(default=None, metadata={"help": "GiB of the GPU that a method may use"})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "where benchmark.json and benchmark.png go"})
    only: str | None = field(default=None, metadata={"help": "measure this method in this process, and print JSON"})

    def __post_init__(self) -> None:
        unknown = set(self.methods.split(",")) - set(METHODS | BASELINES)
        if unknown:
            raise ValueError(f"--methods {','.join(sorted(unknown))}: choose from {', '.join(METHODS | BASELINES)}")
        for name in ("batch_size", "steps", "sequence_length", "layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.layers and not self.shape:
            raise ValueError("--layers cuts a --shape: name one of " + ", ".join(SHAPES))


class Stopwatch(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.start = (0.0, 0.0)

    def read(self) -> tuple[float, float]:
        """Seconds of the clock and of the processor."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup_steps:
            self.start = self.read()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self.cpu_seconds = (now - then for now, then in zip(self.read(), self.start, strict=True))


class TokenCounter:
    """A collator that counts what goes through it: for each batch, the tokens of its rows and those that are learnt."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[tuple[int, int]] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        learnt = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
        self.batches.append((sum(len(row["input_ids"]) for row in rows), learnt))
        return self.collator(rows)


def measure(args: BenchmarkArguments, model_path: str) -> dict[str, Any]:
    """Train with the method `args.only`; returns its figures."""
    method = args.only.removesuffix("_stock").removesuffix("_trl").removesuffix("_4bit")
    if args.memory_cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_cap * GIB / total)
    with tempfile.TemporaryDirectory() as folder:
        words = f"--model_path {model_path} --data_path {args.data_path} --output_dir {folder}/out".split()
        words += f"--per_device_train_batch_size {args.batch_size} --max_steps {args.warmup_steps + args.steps}".split()
        words += f"--gradient_checkpointing {args.gradient_checkpointing} --load_in_4bit {'4bit' in args.only}".split()
        words += "--save_strategy no --logging_steps 1 --dataloader_num_workers 0 --remove_unused_columns True".split()
        pure_bf16 = method == "full" and torch.cuda.is_available()  # float32 weights and states would be 16 bytes each
        words += ["--bf16", str(args.bf16 or pure_bf16)]
        method_arguments, own = {
            "full": (LoraArguments, "--learning_rate 1e-5"),
            "lora": (LoraArguments, "--learning_rate 3e-4 --lora_dropout 0"),  # dropout would part the losses
            "prompt_tuning": (PromptTuningArguments, "--learning_rate 3e-2 --num_virtual_tokens 20"),
        }[method]
        model_args, data_args, method_args, training_args = parse_arguments(method_arguments, None, words + own.split())
        set_seed(training_args.seed)
        tokenizer = load_tokenizer(model_args, data_args.prompt_format)
        dataset = random_rows(args) if args.sequence_length else build_dataset(args.data_path, tokenizer, 1024)
        model = load_model(model_args, training_dtype(training_args), training_args.device)
        products = count_products(model)
        if method == "prompt_tuning":
            model = add_soft_prompt(model, tokenizer, method_args)
        elif method == "lora":
            adapter = build_lora_config(method_args, model)
            model = model if args.only == "lora_trl" else get_peft_model(model, adapter)
        if isinstance(model, PeftModel):
            count_trainable(model)

        stopwatch = Stopwatch(args.warmup_steps)
        if args.only == "lora_trl":
            trainer = make_trl_trainer(model, tokenizer, adapter, training_args, dataset)
            model = trainer.model
        elif args.only.endswith("_stock"):
            model.__class__ = PeftModelForCausalLM  # PEFT's own forward and placement
            collator = DataCollatorForSeq2Seq(tokenizer)
            trainer = Trainer(model, training_args, train_dataset=dataset, data_collator=collator)
        else:
            trainer = make_trainer(model, stop_token_ids(tokenizer)[0], training_args, dataset)
        trainer.add_callback(stopwatch)
        trainer.remove_callback(PrinterCallback)
        if args.only in METHODS:
            with fast_steps(trainer):
                counter = train_and_count(trainer)
        else:
            counter = train_and_count(trainer)

    measured = counter.batches[args.warmup_steps :][: args.steps]
    tokens, learnt = (sum(numbers) for numbers in zip(*measured, strict=True))
    virtual = len(getattr(model, "virtual_tokens", [])) * args.batch_size * args.steps
    factor = 6 if method == "full" else 4  # forward, gradient of activations, and of weights where they are trained
    operations = factor * (products["layers"] * (tokens + virtual) + products["head"] * learnt)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "method": args.only,
        "precision": "nf4" if "4bit" in args.only else str(training_dtype(training_args)).removeprefix("torch."),
        "trainable": trainable,
        "trainable_percent": 100 * trainable / (products["parameters"] + (trainable if method != "full" else 0)),
        "peak_gib": peak_memory() / GIB,
        "seconds": stopwatch.seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "tokens_per_second": tokens / stopwatch.seconds,
        "supervised_tokens_per_second": learnt / stopwatch.seconds,
        "operations_per_second": operations / stopwatch.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def train_and_count(trainer: Trainer) -> TokenCounter:
    trainer.data_collator = counter = TokenCounter(trainer.data_collator)
    trainer.train()
    return counter


def make_trl_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Any,
    training_args: TrainingArguments,
    dataset: Dataset,
) -> Trainer:
    """TRL's trainer at its defaults, but with our learning rate, precision and rows, and without checkpointing."""
    from trl import SFTConfig, SFTTrainer  # not a requirement

    names = "output_dir learning_rate gradient_checkpointing per_device_train_batch_size max_steps save_strategy "
    names += "logging_steps bf16 fp16 seed dataloader_pin_memory use_cpu logging_nan_inf_filter"
    config = SFTConfig(**{name: getattr(training_args, name) for name in names.split()}, report_to="none")
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)


def count_products(model: PreTrainedModel) -> dict[str, int]:
    """The weights that each token is multiplied with, in the layers and in lm_head, and the number of parameters."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    sizes = {name: module.in_features * module.out_features for name, module in linear.items()}
    return {
        "layers": sum(size for name, size in sizes.items() if name != "lm_head"),
        "head": sizes["lm_head"],
        "parameters": model.num_parameters(),
    }


def random_rows(args: BenchmarkArguments) -> Dataset:
    """Rows of random tokens, all of the same length and all of them learnt."""
    generator = torch.Generator().manual_seed(0)
    count = args.batch_size * (args.warmup_steps + args.steps)
    ids = torch.randint(100, 4000, (count, args.sequence_length), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids])


def matrix_product_rate() -> float:
    """Multiplications and additions per second of a large matrix product, in the precision of training."""
    on_cuda = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_cuda else (2048, torch.float32, "cpu")
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if on_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def make_config(shape: str, layers: int | None) -> PreTrainedConfig:
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    family = shape.split("-")[0].removesuffix(".5")
    sizes |= {"head_dim": 128} if family == "qwen3" else {}
    return AutoConfig.for_model(family, max_position_embeddings=32768, **sizes)


def make_random_checkpoint(args: BenchmarkArguments, folder: str) -> None:
    """Write a model of the shape with random weights, and a tokenizer."""
    on_cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    say(f"making random weights of {args.shape}")
    with torch.device("cuda" if on_cuda else "cpu"):
        config = make_config(args.shape, args.layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_cuda else torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def run_child(args: BenchmarkArguments, model_path: str, method: str) -> dict[str, Any] | None:
    """Measure one method in a fresh process; None where it fails, for one of memory for example."""
    words = [sys.executable, __file__, "--only", method, "--model_path", model_path]
    for name, value in asdict(args).items():
        if value is not None and name not in ("only", "shape", "layers"):
            words += [f"--{name}", str(value)]
    result = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        warn(f"{method} was not measured: {result.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def check_losses(results: dict[str, dict[str, Any]]) -> None:
    """Refuse to compare runs of one method whose losses differ, and full fine-tuning whose first loss does."""
    pairs = [(name, name.removesuffix("_stock").removesuffix("_trl"), None) for name in results if name in BASELINES]
    pairs += [("full", "lora", 1)] if "full" in results else []
    for name, other, count in pairs:
        if other not in results:
            continue
        tolerance = max(LARGEST_DIFFERENCE.get(results[key]["precision"], 2e-2) for key in (name, other))
        losses = (results[key]["losses"][:count] for key in (name, other))
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        if not difference <= tolerance:
            fail(f"{name} and {other} differ by {difference:.1e} in a step's loss: their speeds can not be compared", 1)


def format_table(results: dict[str, dict[str, Any]], rate: float) -> str:
    """A Markdown table. Speeds are compared by the seconds of a GPU's clock or of a CPU's work, which is steadier."""
    seconds = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    unit = "s / step" if torch.cuda.is_available() else "CPU s / step"
    lines = [
        f"| method | weights | trainable | % | peak GiB | {unit} | tokens / s | learnt / s | of matmul rate | speed |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in results.items():
        speed = f"{results['full'][seconds] / result[seconds]:.2f}" if "full" in results else ""
        lines.append(
            f"| {(METHODS | BASELINES)[name]} | {result['precision']} | {result['trainable']:,} | "
            f"{result['trainable_percent']:.4f} | {result['peak_gib']:.2f} | {result[seconds] / result['steps']:.3f} | "
            f"{result['tokens_per_second']:,.0f} | {result['supervised_tokens_per_second']:,.0f} | "
            f"{100 * result['operations_per_second'] / rate:.0f}% | {speed} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Bars of memory and speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [(METHODS | BASELINES)[name] for name in results]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1 + 0.5 * len(names)), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes, ("peak_gib", "tokens_per_second"), ("peak memory, GiB", "tokens / s"), strict=True
    ):
        bars = axis.barh(names, [result[key] for result in results.values()])
        axis.bar_label(bars, fmt="{:,.2f}" if key == "peak_gib" else "{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=150)


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
            make_random_checkpoint(args, folder)
            torch.cuda.empty_cache()
        model_path = folder if args.shape else model_args.model_path
        load_tokenizer(ModelArguments(model_path=model_path), "auto")  # a wrong path fails here, in one line
        rate = run_child(args, model_path, "rate")["rate"]
        results = {}
        for name in methods:
            say(f"measuring {(METHODS | BASELINES)[name]}")
            result = run_child(args, model_path, name)
            if result:
                results[name] = result | {"steps": args.steps}
    if not results:
        fail("no method could be measured", 1)
    check_losses(results)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    head = {"device": device, "torch": torch.__version__, "model": args.shape or model_args.model_path}
    head |= {"matrix_product_rate": rate, "arguments": asdict(args), "results": results}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "benchmark.json").write_text(json.dumps(head, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    machine = f"{device}, {rate / 1e12:.2f} TFLOP/s in a matrix product"
    say(f"\n{head['model']} on {machine}; {args.batch_size} rows a step\n")
    say(format_table(results, rate))
    if find_spec("matplotlib"):
        draw(results, output_dir / "benchmark.png")
    else:
        warn("no picture without matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
