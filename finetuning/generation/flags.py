"""The flags of inference.py."""

from dataclasses import dataclass, field
from pathlib import Path

from finetuning.adapter.folder import WEIGHTS
from finetuning.cli.arguments import ModelArguments, ScriptParser
from finetuning.cli.console import fail
from finetuning.generation.generate import MAX_NEW_TOKENS

DEFAULT_ADAPTER = "outputs/lora"


@dataclass
class InferenceArguments:
    _argument_group_name = "inference"

    adapter_path: str | None = field(
        default=None,
        metadata={
            "help": f"folder of a saved adapter; left out: {DEFAULT_ADAPTER} if that exists and no --model_path is "
            "given, else the base model alone"
        },
    )
    instruction: str | None = field(default=None, metadata={"help": "one instruction to answer"})
    input: str = field(default="", metadata={"help": "the text that the instruction is about"})
    interactive: bool = field(default=False, metadata={"help": "chat in the terminal"})
    data_path: str | None = field(default=None, metadata={"help": "rows to answer, JSON list or JSON Lines"})
    tasks: str | None = field(default=None, metadata={"help": "only rows whose 'task' is one of these, commas between"})
    output_file: str | None = field(
        default=None,
        metadata={"help": "file for the answered rows, as JSON Lines; metrics.json goes beside it"},
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
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 avoids tokens that the answer already has"}
    )
    seed: int = field(default=42, metadata={"help": "sampling: the same seed draws the same answers"})

    def __post_init__(self) -> None:
        asked = {"--instruction": self.instruction is not None, "--data_path": bool(self.data_path)}
        asked = [flag for flag, given in (asked | {"--interactive": self.interactive}).items() if given]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other: leave out all but one")
        if self.output_file and not self.data_path:
            raise ValueError("--output_file needs --data_path, the rows to answer")
        for flag in ("batch_size", "max_new_tokens"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.interactive and self.labels:
            raise ValueError("--labels does not work with --interactive: give an --instruction or a --data_path")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("--temperature and --top_p are for sampling: add --do_sample True")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError("--temperature and --repetition_penalty must be above 0, --top_p above 0 and at most 1")


def parse_inference_arguments(
    description: str | None, argv: list[str] | None = None
) -> tuple[ModelArguments, InferenceArguments]:
    """Parse the command line. Base model and quantisation stay None unless given: the adapter knows them.

    Raises:
        SystemExit: code 2, for a flag or value that cannot be used.
    """
    parser = ScriptParser((ModelArguments, InferenceArguments), description)
    parser.set_defaults(model_path=None, load_in_4bit=None)
    model_args, args = parser.to_dataclasses(parser.parse_flags(argv))
    if args.output_file and Path(args.output_file).exists():
        fail(f"--output_file '{args.output_file}' already exists; name another file, or remove it")
    if args.adapter_path is None and model_args.model_path is None and Path(DEFAULT_ADAPTER, WEIGHTS).exists():
        args.adapter_path = DEFAULT_ADAPTER
    return model_args, args
