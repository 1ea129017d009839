"""The flags of benchmark.py."""

from dataclasses import dataclass

from benchmarking.shapes import SHAPES
from benchmarking.table import ALL, METHODS
from finetuning.cli.arguments import beside_scripts, flag


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
    report: str | None = flag(
        None, "files, commas between, that get the table between their lines <!-- benchmark --> and <!-- /benchmark -->"
    )
    only: str | None = flag(None, "measure only this method (or: weights, machine), in this process, and print JSON")

    def __post_init__(self) -> None:
        unknown = set(self.methods.split(",")) - set(ALL)
        if unknown:
            raise ValueError(f"--methods {','.join(sorted(unknown))}: choose from {', '.join(ALL)}")
        if self.layers and not self.shape:
            raise ValueError("--layers cuts a --shape: name one of " + ", ".join(SHAPES))


def memory_flags(args: BenchmarkArguments) -> list[str]:
    """The flags that save memory and are not used yet, in the order to try them."""
    flags = [] if args.gradient_checkpointing else ["--gradient_checkpointing True"]
    flags += ["--batch_size 1"] if args.batch_size > 1 else []
    return flags + ([f"--sequence_length {args.sequence_length // 2}"] if args.sequence_length else [])
