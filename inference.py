"""Answer with a saved adapter: one instruction, a file of rows, or a chat.

    python inference.py                                      # the first rows of data/test.json
    python inference.py --adapter_path outputs/lora --instruction "翻译为英文" --input "早安"
    python inference.py --adapter_path outputs/lora --data_path data/test.json --output_file predictions.jsonl
    python inference.py --adapter_path outputs/lora --data_path data/test.json --tasks sentiment --labels auto
    python inference.py --adapter_path outputs/lora --interactive True

Base model, prompt format, quantisation and stop tokens come from what was saved beside the adapter.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from adapters import TEMPLATE, WEIGHTS, load_adapter, read_adapter
from arguments import ModelArguments, ScriptParser
from chat import chat
from common import load_model, load_tokenizer
from console import fail, say, warn
from generation import (
    MAX_NEW_TOKENS,
    AnswerStreamer,
    answer_in_batches,
    encode_question,
    generate,
    make_generation_config,
)
from labels import choose_labels, classify_in_batches
from metrics import METRICS, report
from predictions import Predictions
from rows import load_rows, question

DEFAULT_ADAPTER = "outputs/lora"
DEFAULT_ROWS = "data/test.json"
SAMPLE_ROWS = 8


@dataclass
class InferenceArguments:
    _argument_group_name = "inference"

    adapter_path: str | None = field(
        default=None,
        metadata={
            "help": f"folder of a saved adapter, or none for the bare base model; {DEFAULT_ADAPTER} if that exists and "
            "no --model_path is given"
        },
    )
    instruction: str | None = field(default=None, metadata={"help": "one instruction to answer"})
    input: str = field(default="", metadata={"help": "the text that the instruction speaks of"})
    interactive: bool = field(default=False, metadata={"help": "chat in the terminal"})
    data_path: str | None = field(default=None, metadata={"help": "rows to answer, JSON list or JSON Lines"})
    tasks: str | None = field(default=None, metadata={"help": "only rows whose 'task' is one of these, commas between"})
    output_file: str | None = field(
        default=None,
        metadata={"help": "where the answered rows go, as JSON Lines, and metrics.json beside them"},
    )
    labels: str | None = field(
        default=None,
        metadata={
            "help": "answer with the most probable of these words, commas between, and its probability; auto: the "
            "label words of the training data"
        },
    )
    batch_size: int = field(default=16, metadata={"help": "rows answered at once"})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "longest answer, in tokens"})
    do_sample: bool = field(default=False, metadata={"help": "draw tokens at random instead of the most probable one"})
    temperature: float = field(default=1.0, metadata={"help": "sampling: below 1 prefers probable tokens"})
    top_p: float = field(default=1.0, metadata={"help": "sampling: only the tokens that make up this probability"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1 avoids tokens the answer already holds"})
    seed: int = field(default=42, metadata={"help": "sampling: the same seed draws the same answers"})

    def __post_init__(self) -> None:
        asked = {"--instruction": self.instruction is not None, "--data_path": bool(self.data_path)}
        asked = [flag for flag, given in (asked | {"--interactive": self.interactive}).items() if given]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} ask in different ways: leave out all but one")
        if self.output_file and not self.data_path:
            raise ValueError("--output_file needs --data_path, the rows to answer")
        for flag in ("batch_size", "max_new_tokens"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.interactive and self.labels:
            raise ValueError("--labels does not go with --interactive: give an --instruction or a --data_path")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("--temperature and --top_p are for sampling: add --do_sample True")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError("--temperature and --repetition_penalty must be above 0, --top_p above 0 and at most 1")


def parse_inference_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, InferenceArguments]:
    parser = ScriptParser((ModelArguments, InferenceArguments), __doc__)
    parser.set_defaults(model_path=None, load_in_4bit=None)  # known to the adapter
    model_args, args = parser.to_dataclasses(parser.parse_flags(argv))
    if args.output_file and Path(args.output_file).exists():
        fail(f"--output_file '{args.output_file}' already exists; name another file, or remove it")
    default_adapter = Path(DEFAULT_ADAPTER, WEIGHTS).exists() and model_args.model_path is None
    args.adapter_path = args.adapter_path or (DEFAULT_ADAPTER if default_adapter else "none")
    if args.adapter_path == "none":
        args.adapter_path = None
    return model_args, args


def load_for_inference(
    model_args: ModelArguments, adapter_path: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Load the base model with the adapter as it was trained; what `model_args` says comes first.

    Returns:
        model, tokenizer, and the contents of adapter_info.json.
    """
    config, info = read_adapter(adapter_path) if adapter_path else ({}, {})
    if adapter_path and not info:
        warn(f"'{adapter_path}' was not saved by this project: prompt format and base model can not be checked")
    if model_args.model_path is None:
        model_args.model_path = config.get("base_model_name_or_path") or ModelArguments.model_path
    if model_args.load_in_4bit is None:
        model_args.load_in_4bit = info.get("quantization") is not None

    tokenizer = load_tokenizer(model_args, info.get("prompt_format", "auto"))
    if adapter_path and Path(adapter_path, TEMPLATE).is_file():
        tokenizer.chat_template = Path(adapter_path, TEMPLATE).read_text(encoding="utf-8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained_in_bf16 = info and info["base_fingerprint"]["dtype"] == "bfloat16"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16 if trained_in_bf16 else torch.float16
    model = load_model(model_args, dtype, device)
    return (load_adapter(model, adapter_path, info) if adapter_path else model.eval()), tokenizer, info


def describe_settings(model_args: ModelArguments, args: InferenceArguments) -> dict[str, Any]:
    """All that the predictions for a data file depend on."""
    files = {"data_sha256": Path(args.data_path or DEFAULT_ROWS)}
    if args.adapter_path:
        files["adapter_sha256"] = Path(args.adapter_path, WEIGHTS)
    names = ("tasks", "labels", "max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty", "seed")
    return {
        "model_path": model_args.model_path,
        "load_in_4bit": model_args.load_in_4bit,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        **{name: getattr(args, name) for name in names},
    }


def read_questions(args: InferenceArguments) -> list[dict[str, Any]]:
    """The rows to answer: the one instruction, the file's, or those of the sample data that show what is to be had."""
    if args.instruction is not None:
        row = {"instruction": args.instruction, "input": args.input}
        return [row | {"task": args.tasks} if args.tasks else row]
    path = args.data_path or DEFAULT_ROWS
    rows = load_rows(path, output_required=False)
    if args.tasks:
        rows = [row for row in rows if row.get("task") in args.tasks.split(",")]
        if not rows:
            fail(f"--tasks {args.tasks}: {path} has no row with such a 'task'")
    return rows if args.data_path else rows[:SAMPLE_ROWS]


def answer_instruction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    labels: list[tuple[str, ...]] | None,
    config: GenerationConfig,
) -> None:
    """Print an answer, on a terminal while it is generated; or the labels with their probabilities, the best first."""
    prompt = encode_question(row, tokenizer)
    if labels:
        _, [prediction] = next(classify_in_batches(model, tokenizer, [prompt], labels, batch_size=1))
        for label, probability in prediction["probabilities"].items():
            print(f"{label}\t{probability:.4f}")
        return
    streamer = AnswerStreamer(tokenizer, lambda text: print(text, end="", flush=True)) if sys.stdout.isatty() else None
    answer = generate(model, tokenizer, [prompt], config, streamer)[0]
    print("" if streamer else answer.text)
    if answer.cut:
        warn(f"the answer was cut at {config.max_new_tokens} tokens (--max_new_tokens)")


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    labels: list[tuple[str, ...]] | None,
    config: GenerationConfig,
    args: InferenceArguments,
    settings: dict[str, Any],
) -> None:
    """Answer a file's rows; print or write them, and print how good the answers are."""
    predictions = Predictions(args.output_file, settings)
    todo = [number for number in range(len(rows)) if number not in predictions.by_row]
    prompts = [encode_question(rows[number], tokenizer) for number in todo]
    if labels:
        own_labels = [labels[number] for number in todo]
        batches = classify_in_batches(model, tokenizer, prompts, own_labels, args.batch_size)
    else:
        batches = answer_in_batches(model, tokenizer, prompts, args.batch_size, config)
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="answering", unit="row") as bar:
        for places, batch in batches:
            predictions.add([todo[place] for place in places], batch)
            bar.update(len(places))
    answered = predictions.finish(rows)
    if not args.output_file:
        for row in answered:
            print(json.dumps(question(row), ensure_ascii=False))
    metrics_file = Path(args.output_file).with_name(METRICS) if args.output_file else None
    in_order = [predictions.by_row[number] for number in range(len(rows))]
    report(rows, in_order, metrics_file, adapter_path=args.adapter_path, data_path=args.data_path)
    if args.output_file:
        say(f"answers are in {args.output_file}, scores in {metrics_file}")


def main() -> None:
    model_args, args = parse_inference_arguments()
    rows = [] if args.interactive else read_questions(args)
    model, tokenizer, info = load_for_inference(model_args, args.adapter_path)
    labels = choose_labels(args.labels, rows, info.get("labels", {})) if args.labels else None
    config = make_generation_config(
        tokenizer, args.max_new_tokens, args.do_sample, args.temperature, args.top_p, args.repetition_penalty
    )
    set_seed(args.seed)
    try:
        if args.interactive:
            chat(model, tokenizer, config)
        elif args.instruction is not None:
            answer_instruction(model, tokenizer, rows[0], labels, config)
        else:
            answer_rows(model, tokenizer, rows, labels, config, args, describe_settings(model_args, args))
    except KeyboardInterrupt:
        fail("stopped" + ("; the same command goes on from here" if args.output_file else ""), 130)


if __name__ == "__main__":
    main()
