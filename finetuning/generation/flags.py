"""The flags of inference.py."""

from dataclasses import dataclass
from pathlib import Path

from finetuning.adapter.folder import CONFUSION, METRICS, WEIGHTS
from finetuning.cli.arguments import ModelArguments, ScriptParser, flag
from finetuning.cli.console import fail
from finetuning.generation.generate import MAX_NEW_TOKENS, MAX_THINKING_TOKENS
from finetuning.preprocessing.flags import FieldArguments

DEFAULT_ADAPTER = "outputs/lora"


@dataclass
class InferenceArguments(FieldArguments):
    _argument_group_name = "inference"

    adapter_path: str | None = flag(
        None, f"folder of a saved adapter; left out: {DEFAULT_ADAPTER} if it exists, or, with --model_path, no adapter"
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
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("show_prompt", "labels"):
            if getattr(self, name) and self.interactive:
                raise ValueError(f"--{name} does not work with --interactive: give an --instruction or a --data_path")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("--temperature and --top_p are for sampling: add --do_sample True")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError("--temperature and --repetition_penalty must be above 0, --top_p above 0 and at most 1")


def memory_flags(model_args: ModelArguments, args: InferenceArguments, max_new_tokens: int) -> list[str]:
    """The flags that save memory while answering and are not used yet, in the order to try them."""
    in_batches = args.batch_size > 1 and args.instruction is None and not args.interactive
    flags = [f"--batch_size {max(1, args.batch_size // 4)}"] if in_batches else []
    flags += [] if model_args.load_in_4bit else ["--load_in_4bit True"]
    return flags + ([] if args.labels else [f"--max_new_tokens {max(1, max_new_tokens // 2)}"])


def parse_inference_arguments(
    description: str | None, argv: list[str] | None = None
) -> tuple[ModelArguments, InferenceArguments]:
    """Parse the command line. Base model and quantisation stay None unless given: the adapter knows them."""
    parser = ScriptParser((ModelArguments, InferenceArguments), description)
    parser.set_defaults(model_path=None, load_in_4bit=None)
    model_args, args = parser.parse(argv)
    output = Path(args.output_file or "")
    files = [output, output.with_suffix(f".{METRICS}"), output.with_suffix(f".{CONFUSION}")] if args.output_file else []
    named = [("output_file", file) for file in files] + ([("report", Path(args.report))] if args.report else [])
    for name, file in named:
        if file.exists():
            fail(f"--{name}: '{file}' already exists; name another file, or remove it")
    if args.adapter_path is None and model_args.model_path is None and Path(DEFAULT_ADAPTER, WEIGHTS).exists():
        args.adapter_path = DEFAULT_ADAPTER
    return model_args, args
