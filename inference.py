"""Answer with a saved adapter: one instruction, a file of rows, or a chat.

    python inference.py                                      # the first rows of data/test.json
    python inference.py --adapter_path outputs/lora --instruction "翻译为英文" --input "早安"
    python inference.py --adapter_path outputs/lora --data_path data/test.json --output_file predictions.jsonl
    python inference.py --adapter_path outputs/lora --data_path data/test.json --tasks sentiment --labels auto
    python inference.py --adapter_path outputs/lora --interactive True

Base model, prompt format, quantisation and stop tokens come from what was saved beside the adapter.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from common import load_model, load_tokenizer
from finetuning.cli.arguments import ModelArguments, ScriptParser, beside_scripts, flag
from finetuning.cli.memory import memory_advice
from finetuning.generation.answer_page import write_page
from finetuning.generation.chat import chat
from finetuning.generation.evaluate import answer_instruction, answer_rows, load_rows
from finetuning.generation.generate import (
    MAX_NEW_TOKENS,
    MAX_THINKING_TOKENS,
    encode_question,
    make_generation_config,
    without_answer,
)
from finetuning.generation.labels import choose_labels
from finetuning.generation.metrics import report
from finetuning.generation.predictions import Predictions
from finetuning.model.base_model import check_model_path, checkpoint_dtype
from finetuning.model.folder import CONFUSION, METRICS, WEIGHTS, find_adapter, load_adapter, read_adapter
from finetuning.preprocessing.files import find_files, hash_files
from finetuning.preprocessing.flags import FORMATS, FieldArguments
from finetuning.preprocessing.rows import Row, as_json, task_of, to_nfc
from finetuning.preprocessing.templates import is_thinking

DEFAULT_ADAPTER = "outputs/lora"
SAMPLE_ROWS = 8


@dataclass
class InferenceArguments(FieldArguments):
    _argument_group_name = "inference"

    adapter_path: str | None = flag(
        None, f"folder of a saved adapter; left out: {DEFAULT_ADAPTER} if it exists, or, with --model_path, no adapter"
    )
    prompt_format: str | None = flag(
        None, "chat, plain or auto, as in training; left out: as the adapter was trained", choices=list(FORMATS)
    )
    instruction: str | None = flag(None, "one instruction to answer")
    input: str = flag("", "the text that the instruction is about")
    interactive: bool = flag(False, "chat in the terminal")
    data_path: str | None = flag(None, "rows to answer: files of any form that training reads")
    tasks: str | None = flag(None, "only rows whose 'task' is one of these, commas between")
    output_file: str | None = flag(
        None, "JSON Lines of the answered rows; their scores go to a .metrics.json beside it"
    )
    report: str | None = flag(None, "HTML page of the answers, the wrong ones marked, to open in a browser")
    labels: str | None = flag(
        None, "answer with the most probable of these words, commas between; auto: the label words of the training data"
    )
    batch_size: int = flag(16, "rows answered at once")
    max_new_tokens: int | None = flag(
        None, f"longest answer, in tokens; left out: {MAX_NEW_TOKENS}, or {MAX_THINKING_TOKENS} with its thought"
    )
    do_sample: bool = flag(False, "draw tokens at random instead of the most probable one")
    temperature: float = flag(1.0, "sampling: below 1 prefers probable tokens")
    top_p: float = flag(1.0, "sampling: only the tokens that make up this probability")
    repetition_penalty: float = flag(1.0, "above 1 avoids tokens that the answer already has")
    show_prompt: bool = flag(False, "print the text of the prompt and its token ids first (of a file, the first row's)")
    seed: int = flag(42, "sampling: the same seed draws the same answers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input and self.instruction is None:
            raise ValueError("--input is what an --instruction is about: add one, or leave --input out")
        if self.rename and not self.data_path:
            raise ValueError("--instruction_field and the like name fields of a data file: add --data_path")
        asked = {"--instruction": self.instruction is not None, "--data_path": bool(self.data_path)}
        asked = [name for name, given in (asked | {"--interactive": self.interactive}).items() if given]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other: leave out all but one")
        for name in ("instruction", "input"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name) or ""):
                raise ValueError(f"--{name} has bytes that are not UTF-8; type it again, or use a --data_path")
        for name in ("output_file", "report"):
            if getattr(self, name) and not self.data_path:
                raise ValueError(f"--{name} needs --data_path, the rows to answer")
        for name in ("show_prompt", "labels"):
            if getattr(self, name) and self.interactive:
                raise ValueError(f"--{name} does not work with --interactive: give an --instruction or a --data_path")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("--temperature and --top_p are for sampling: add --do_sample True")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError("--temperature and --repetition_penalty must be above 0, --top_p above 0 and at most 1")

    @property
    def rows_path(self) -> str:
        return self.data_path or beside_scripts("data/test.json")


def parse_inference_arguments(
    description: str | None, argv: list[str] | None = None
) -> tuple[ModelArguments, InferenceArguments]:
    """Parse the command line. Base model and quantisation stay None unless given: the adapter knows them."""
    parser = ScriptParser((ModelArguments, InferenceArguments), description)
    parser.set_defaults(model_path=None, load_in_4bit=None)
    model_args, args = parser.parse(argv)
    output = Path(args.output_file or "")
    files = [output, output.with_suffix(f".{METRICS}"), output.with_suffix(f".{CONFUSION}")] if args.output_file else []
    if args.report and Path(args.report).absolute() in [file.absolute() for file in files]:
        fail(f"--report '{args.report}' is where the answers or their scores go; name another file")
    named = [("output_file", file) for file in files] + ([("report", Path(args.report))] if args.report else [])
    for name, file in named:
        if file.exists():
            fail(f"--{name}: '{file}' already exists; name another file, or remove it")
    if args.adapter_path is None and model_args.model_path is None and Path(DEFAULT_ADAPTER, WEIGHTS).exists():
        args.adapter_path = DEFAULT_ADAPTER
    return model_args, args


def read_questions(args: InferenceArguments) -> list[Row]:
    """The rows to answer: the instruction, or those of the data file; without either the first few of the samples."""
    if args.interactive or args.instruction is not None:
        row = {"instruction": args.instruction, "input": args.input}
        return [row | {"task": args.tasks} if args.tasks else row]
    rows = load_rows(args.rows_path, args.rename)
    if args.tasks:
        tasks = {to_nfc(task.strip()) for task in args.tasks.split(",")}
        rows = [row for row in rows if "task" in row and to_nfc(task_of(row)) in tasks]
        if missing := tasks - {to_nfc(task_of(row)) for row in rows}:
            fail(f"--tasks {args.tasks}: {args.rows_path} has no row with the 'task' {', '.join(sorted(missing))}")
    return rows if args.data_path else rows[:SAMPLE_ROWS]


def inference_dtype(device_type: str, stored: str | None, trained: str | None, has_bf16: bool) -> torch.dtype:
    """The dtype of the base model: on a GPU the half precision that the adapter was trained with; if there is none,
    bfloat16 for a checkpoint that is stored in it, whose activations may exceed float16, if the GPU computes in it."""
    if device_type == "cpu":
        return torch.float32
    if trained in ("float16", "bfloat16"):
        return getattr(torch, trained)
    return torch.bfloat16 if stored == "bfloat16" and has_bf16 else torch.float16


def load_for_inference(
    model_args: ModelArguments, adapter_path: str | None, format_name: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Load the base model with the adapter as it was trained; `model_args` overrides what the adapter says. The third
    part of the result is the contents of adapter_info.json."""
    config, info = read_adapter(adapter_path) if adapter_path else ({}, {})
    if model_args.model_path is None:
        if config and not config.get("base_model_name_or_path"):
            fail(f"'{adapter_path}' does not say which base model it was trained on: name it with --model_path")
        model_args.model_path = config.get("base_model_name_or_path", ModelArguments.model_path)
        check_model_path(model_args.model_path, f"the base model of '{adapter_path}'" if config else "--model_path")
    if model_args.load_in_4bit is None:
        model_args.load_in_4bit = info.get("quantization") is not None
    tokenizer = load_tokenizer(model_args, format_name, adapter_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    trained = info["base_fingerprint"]["dtype"] if info else None
    dtype = inference_dtype(device.type, checkpoint_dtype(model_args.model_path), trained, has_bf16)
    model = load_model(model_args, dtype, device)
    with memory_advice(device, [] if model_args.load_in_4bit else ["--load_in_4bit True"], "while loading the adapter"):
        model = load_adapter(model, adapter_path, info) if adapter_path else model.eval()
    return model, tokenizer, info


def memory_flags(model_args: ModelArguments, args: InferenceArguments, max_new_tokens: int) -> list[str]:
    """The flags that save memory while answering and are not used yet, in the order to try them."""
    in_batches = args.batch_size > 1 and args.instruction is None and not args.interactive
    flags = [f"--batch_size {max(1, args.batch_size // 4)}"] if in_batches else []
    flags += [] if model_args.load_in_4bit else ["--load_in_4bit True"]
    return flags + ([] if args.labels else [f"--max_new_tokens {max(1, max_new_tokens // 2)}"])


def describe_settings(model_args: ModelArguments, args: InferenceArguments) -> dict[str, Any]:
    """Everything that the predictions for a data file depend on."""
    names = ("tasks", "labels", "max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty", "seed")
    settings = {name: getattr(model_args, name) for name in ("model_path", "load_in_4bit")}
    settings |= {"data_sha256": hash_files(find_files(args.rows_path)), "fields": args.rename}
    settings |= {"prompt_format": args.prompt_format}
    settings |= {name: getattr(args, name) for name in names}
    if args.adapter_path:
        settings["adapter_sha256"] = hashlib.sha256(Path(args.adapter_path, WEIGHTS).read_bytes()).hexdigest()
    return settings


def print_answers(
    rows: list[Row], predictions: Predictions, labels: dict[str, list[str]], args: InferenceArguments
) -> None:
    """Print or write the answered rows, and print how good the answers are; `labels` are those of the training data."""
    answered = predictions.finish(rows)
    if not args.output_file:
        for row in answered:
            print(as_json(without_answer(row)))
    metrics_file = Path(args.output_file).with_suffix(f".{METRICS}") if args.output_file else None
    sources = {"adapter_path": args.adapter_path, "data_path": args.data_path}
    scores = report(rows, predictions.in_order(), labels, metrics_file, **sources)
    if args.output_file:
        say(f"answers are in {args.output_file}, scores in {metrics_file}")
    if args.report:
        try:
            write_page(args.report, rows, predictions.in_order(), scores, **sources)
        except OSError as error:
            fail(f"--report '{args.report}' cannot be written: {error.strerror}", 1)
        say(f"the answers as a page: {args.report}")


def main() -> None:
    model_args, args = parse_inference_arguments(__doc__)
    if args.adapter_path:
        args.adapter_path = find_adapter(args.adapter_path)
    rows = read_questions(args)
    model, tokenizer, info = load_for_inference(model_args, args.adapter_path, args.prompt_format)
    labels = choose_labels(args.labels, rows, info.get("labels", {})) if args.labels else None
    if labels and info.get("thinking") and not is_thinking(tokenizer):
        fail("--labels: this adapter writes a thought as the beginning of its answer; leave the flag out")
    config = make_generation_config(
        tokenizer, args.max_new_tokens, args.do_sample, args.temperature, args.top_p, args.repetition_penalty
    )
    set_seed(args.seed)
    if args.show_prompt:
        prompt = encode_question(rows[0], tokenizer)  # on stderr, so that stdout gets the answer alone
        print(f"prompt, {len(prompt):,} tokens: {tokenizer.decode(prompt)!r}\nids: {prompt}", file=sys.stderr)
    try:
        with memory_advice(model.device, memory_flags(model_args, args, config.max_new_tokens)):
            if args.interactive:
                chat(model, tokenizer, config)
            elif args.instruction is not None:
                answer_instruction(model, tokenizer, rows[0], config, labels)
            else:
                predictions = Predictions(args.output_file, describe_settings(model_args, args))
                answer_rows(model, tokenizer, rows, predictions, args.batch_size, config, labels)
                print_answers(rows, predictions, info.get("labels", {}), args)
    except KeyboardInterrupt:
        fail("stopped" + ("; the same command resumes from here" if args.output_file else ""), 130)


if __name__ == "__main__":
    main()
