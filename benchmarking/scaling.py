"""The memory that a step needs on each GPU, computed for several models, sharded or not; nothing is measured.

    python -m benchmarking.scaling --report docs/scaling.md,docs/scaling_zh.md
    python -m benchmarking.scaling --cards 8,12,16,24,48,80 --report README.md,README_zh.md
    python -m benchmarking.scaling --kept True --shapes qwen2.5-7b

The arithmetic is that of a dry run (finetuning/training/memory.py). What the backward pass keeps is counted on tensors
that have a shape and a dtype, but no values, in the operations of a GPU: float16, `varlen_attn` for the attention.
"""

from dataclasses import dataclass
from functools import cache

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode  # as documented; the meta device has no autocast
from transformers import AutoModelForCausalLM

from benchmarking.pages import find_pages, write_table
from benchmarking.shapes import SHAPES, make_config
from finetuning.cli.arguments import ScriptParser, flag
from finetuning.cli.console import say
from finetuning.cli.memory import GIB
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.training.attention import attention
from finetuning.training.collators import FlattenCollator
from finetuning.training.memory import Need, Size, compute_step, count_kept_bytes, measure_size

CONTEXT = 0.5  # GiB that CUDA itself takes
USABLE = 0.95  # of a GPU's memory: PyTorch keeps some between its tensors, and a card of 24 GB has a little less
LARGE = "qwen2.5-7b,qwen2.5-14b,qwen2.5-32b,qwen2.5-72b"
METHODS = {"lora": "LoRA on q, k, v", "lora, no dropout": "LoRA, --lora_dropout 0", "prompt_tuning": "prompt tuning"}
TOKENS = 256  # to count on


@dataclass
class ScalingArguments:
    _argument_group_name = "scaling"

    shapes: str | None = flag(None, "of released models, commas between (default: from 7b; with --cards: all)")
    gpus: int = flag(8, "over which FSDP or ZeRO-3 shards the weights")
    cards: str | None = flag(None, "GiB of single GPUs, commas between: which models fit, in a table of its own")
    kept: bool = flag(False, "only what a token keeps for the backward pass, in each layer")
    tokens: int = flag(1024, "of the rows that a GPU gets at once")
    report: str | None = flag(
        None, "files, commas between, that get the table between their lines <!-- memory --> and <!-- /memory -->"
    )

    def __post_init__(self) -> None:
        self.shapes = self.shapes or (",".join(SHAPES) if self.cards else LARGE)
        unknown = [shape for shape in self.shapes.split(",") if shape not in SHAPES]
        if unknown:
            raise ValueError(f"--shapes {','.join(unknown)}: choose from {', '.join(SHAPES)}")
        if self.cards and not all(card.isdecimal() for card in self.cards.split(",")):
            raise ValueError(f"--cards {self.cards}: whole numbers of GiB, such as 8,24,80")


class GpuDropout(torch.nn.Module):
    """Dropout as on a GPU, which keeps a byte for each number; a CPU keeps as many as the number has."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(states, 0.05, True)[0]


def make_model(shape: str, layers: int, method: str) -> PeftModel:
    """Some layers of a shape in float16 on the meta device, with the default adapter of one of the METHODS."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape, layers), dtype=torch.float16)
        if method == "prompt_tuning":
            return SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
        dropout = 0.0 if method == "lora, no dropout" else 0.05
        names = ["q_proj", "k_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names, lora_dropout=dropout))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Dropout):
                module.register_module(name, GpuDropout())
    return model


@cache
def count_weights(shape: str, method: str) -> tuple[Size, int]:
    """The weights of a released model, and how many of them are trained; none of them is made."""
    layers = SHAPES[shape]["num_hidden_layers"]
    model = make_model(shape, 1, method)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return measure_size(model.get_base_model(), layers), trained * (1 if method == "prompt_tuning" else layers)


@cache
def kept_bytes(shape: str, method: str, cast_inputs: bool = False) -> float:
    """The bytes that a token keeps in a layer: a second difference, in which all else cancels.

    Args:
        cast_inputs: with PEFT's cast of the input of LoRA layers, which our Trainer switches off.
    """
    sizes = {}
    for layers in (1, 2):
        model = make_model(shape, layers, method).to_empty(device="cpu").train()  # memory that is never touched
        for tokens in (TOKENS, 2 * TOKENS):
            batch = FlattenCollator()([dict.fromkeys(("input_ids", "labels"), [1] * tokens)])
            del batch["labels"]  # no loss
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                attention(model.get_base_model(), "varlen"),
                disable_input_dtype_casting(model, active=not cast_inputs),
                torch.autocast("cpu", torch.float16),
            ):
                sizes[layers, tokens] = count_kept_bytes(lambda model=model, batch=batch: model(**batch))
    one, two = (sizes[layers, 2 * TOKENS] - sizes[layers, TOKENS] for layers in (1, 2))
    return (two - one) / TOKENS


def step_memory(shape: str, method: str, in_4bit: bool, checkpointing: bool, tokens: int, gpus: int = 1) -> Need:
    """What a step of a released model needs on each GPU, with one of the METHODS."""
    size, trained = count_weights(shape, method)
    kept = kept_bytes(shape, method) * size.layers
    return compute_step(size, kept, tokens, trained, checkpointing, in_4bit=in_4bit, gpus=gpus)


def make_table(shapes: list[str], tokens: int, gpus: int) -> str:
    """A Markdown table, in GiB on each GPU."""
    lines = [
        "| model | precision | weights | in GiB | LoRA | checkpointed | prompt tuning | checkpointed |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for shape in shapes:
        for in_4bit in (False, True):
            for count in (1, gpus):
                needed = [
                    step_memory(shape, method, in_4bit, checkpointing, tokens, count)
                    for method in ("lora", "prompt_tuning")
                    for checkpointing in (False, True)
                ]
                name = "full" if count == 1 else f"{count} shards"
                kind = "4-bit" if in_4bit else "16-bit"
                cells = [f"{size / GIB:.1f}" for size in (needed[0].weights, *(need.total() for need in needed))]
                lines.append(f"| {shape} | {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest_that_fits(
    card: int, shapes: list[str], method: str, in_4bit: bool, checkpointing: bool, tokens: int
) -> str:
    """The size in the name of the largest model that a GPU of `card` GiB can train, "none" if there is none."""
    needed = {shape: step_memory(shape, method, in_4bit, checkpointing, tokens).total() / GIB for shape in shapes}
    fits = [shape for shape, total in needed.items() if total + CONTEXT <= USABLE * card]
    return (
        max(fits, key=lambda shape: count_weights(shape, method)[0].weights()).split("-")[1].upper() if fits else "none"
    )


def make_cards_table(cards: list[int], shapes: list[str], tokens: int) -> str:
    """A Markdown table: the largest model that fits each GPU, without and with checkpointing; what a 7B trains."""
    methods = [("lora", False), ("lora", True), ("prompt_tuning", False), ("prompt_tuning", True)]
    lines = ["| GPU | LoRA | QLoRA | prompt tuning | prompt tuning, 4-bit |", "|--:|--:|--:|--:|--:|"]
    for card in cards:
        cells = []
        for method, in_4bit in methods:
            sizes = [largest_that_fits(card, shapes, method, in_4bit, on, tokens) for on in (False, True)]
            cells.append(" / ".join(sizes))
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    cells = []
    for method, _ in methods:
        size, trained = count_weights("qwen2.5-7b", method)
        cells.append(f"{trained:,} ({100 * trained / size.weights():.4f}%)")
    lines.append(f"| a 7B trains | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    (args,) = ScriptParser((ScalingArguments,), __doc__).parse()
    pages = find_pages(args.report, "memory")
    shapes = args.shapes.split(",")
    if args.kept:
        for shape in shapes:
            say(f"{shape}, float16: KiB kept for the backward pass, for each token and layer")
            for method, title in METHODS.items():
                inputs = make_config(shape).hidden_size * 2
                say(f"  {title:22} {kept_bytes(shape, method) / 1024:6.1f}, with checkpointing {inputs / 1024:5.1f}")
        return
    if args.cards:
        table = make_cards_table([int(card) for card in args.cards.split(",")], shapes, args.tokens)
    else:
        table = make_table(shapes, args.tokens, args.gpus)
    say(table)
    write_table(pages, "memory", table)


if __name__ == "__main__":
    main()
