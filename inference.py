"""Answer with a saved adapter: one instruction, or a file of rows.

    python inference.py                                      # the first rows of data/test.json
    python inference.py --adapter_path outputs/lora --instruction "翻译为英文" --input "早安"
    python inference.py --adapter_path outputs/lora --data_path data/test.json --output_file predictions.jsonl

Base model, prompt format, quantisation and stop tokens come from what was saved beside the adapter.
"""

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapters import TEMPLATE, load_adapter, read_adapter
from arguments import ModelArguments, ScriptParser
from common import load_model, load_tokenizer, to_messages
from console import fail, say, warn
from metrics import format_scores, score
from prompts import clean_answer, encode_messages, stop_token_ids
from rows import load_rows
from soft_prompts import SoftPromptModel

DEFAULT_ADAPTER = "outputs/lora"
DEFAULT_ROWS = "data/test.json"


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
    data_path: str | None = field(default=None, metadata={"help": "rows to answer, JSON list or JSON Lines"})
    tasks: str | None = field(default=None, metadata={"help": "only rows whose 'task' is one of these, commas between"})
    output_file: str | None = field(default=None, metadata={"help": "where the answered rows go, as JSON Lines"})
    batch_size: int = field(default=16, metadata={"help": "rows answered at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})


def parse_inference_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, InferenceArguments]:
    parser = ScriptParser((ModelArguments, InferenceArguments), __doc__)
    parser.set_defaults(model_path=None, load_in_4bit=None)  # known to the adapter
    model_args, args = parser.to_dataclasses(parser.parse_flags(argv))
    if args.instruction is not None and args.data_path:
        fail("--instruction asks one question and --data_path a file of them: leave one of them out")
    if args.output_file and not args.data_path:
        fail("--output_file needs --data_path, the rows to answer")
    if args.output_file and Path(args.output_file).exists():
        fail(f"--output_file '{args.output_file}' already exists; name another file, or remove it")
    for flag in ("batch_size", "max_new_tokens"):
        if getattr(args, flag) < 1:
            fail(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if (
        args.adapter_path is None
        and model_args.model_path is None
        and Path(DEFAULT_ADAPTER, "adapter_config.json").exists()
    ):
        args.adapter_path = DEFAULT_ADAPTER
    if args.adapter_path == "none":
        args.adapter_path = None
    return model_args, args


def load_for_inference(
    model_args: ModelArguments, adapter_path: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model with the adapter as it was trained; what `model_args` says comes first."""
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
    trained = info["base_fingerprint"]["dtype"] if info else "float16"
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, trained)
    model = load_model(model_args, dtype, device)
    return (load_adapter(model, adapter_path, info) if adapter_path else model.eval()), tokenizer


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> tuple[list[str], int]:
    """Answer a batch of prompts greedily.

    Args:
        prompts: token ids, of any lengths.

    Returns:
        the answers, and how many of them were cut off at `max_new_tokens` without a stop token.
    """
    stop_ids = stop_token_ids(tokenizer)
    if isinstance(model, SoftPromptModel):
        prompts = [model.virtual_tokens + ids for ids in prompts]
    length = max(map(len, prompts))
    input_ids = torch.tensor([[stop_ids[0]] * (length - len(ids)) + ids for ids in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    # A fresh configuration: those of Instruct models ask for sampling.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
    )
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=greedy)
    answers, cut = [], 0
    for ids in output[:, length:].tolist():
        end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        cut += end is None
        answers.append(clean_answer(tokenizer.decode(ids[:end]), tokenizer))
    return answers, cut


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Answer rows in batches of similar length, and return the answers in the rows' order."""
    prompts = [encode_messages(to_messages(question(row), tokenizer), tokenizer)[0] for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(prompts[number]), reverse=True)
    answers = [""] * len(rows)
    cut = 0
    with tqdm(total=len(rows), desc="answering", unit="row", disable=len(rows) <= batch_size) as bar:
        for start in range(0, len(rows), batch_size):
            numbers = order[start : start + batch_size]
            texts, cut_here = generate(model, tokenizer, [prompts[number] for number in numbers], max_new_tokens)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
            cut += cut_here
            bar.update(len(numbers))
    if cut:
        warn(f"{cut} of {len(rows)} answers were cut off at {max_new_tokens} tokens (--max_new_tokens)")
    return answers


def question(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the answer it may hold."""
    if "messages" in row:
        messages = row["messages"]
        return {"messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
    return {name: value for name, value in row.items() if name != "output"}


def main() -> None:
    model_args, args = parse_inference_arguments()
    if args.instruction is not None:
        rows = [{"instruction": args.instruction, "input": args.input}]
    else:
        rows = load_rows(args.data_path or DEFAULT_ROWS, output_required=False)
    if args.tasks:
        rows = [row for row in rows if row.get("task") in args.tasks.split(",")]
        if not rows:
            fail(f"--tasks {args.tasks}: {args.data_path} has no row with such a 'task'")
    if args.instruction is None and not args.data_path:
        rows = rows[:8]
    model, tokenizer = load_for_inference(model_args, args.adapter_path)
    answers = answer_rows(model, tokenizer, rows, args.batch_size, args.max_new_tokens)

    if args.instruction is not None:
        print(answers[0])
        return
    if args.output_file:
        with open(args.output_file, "x", encoding="utf-8") as file:
            for row, answer in zip(rows, answers, strict=True):
                file.write(json.dumps(row | {"prediction": answer}, ensure_ascii=False) + "\n")
        say(f"{len(rows)} answers written to {args.output_file}")
    else:
        for row, answer in zip(rows, answers, strict=True):
            print(json.dumps(question(row) | {"prediction": answer}, ensure_ascii=False))
    if all("output" in row for row in rows):
        if find_spec("sacrebleu"):
            print(format_scores(score(rows, answers)))
        else:
            warn("no scores without sacrebleu: pip install sacrebleu")


if __name__ == "__main__":
    main()
