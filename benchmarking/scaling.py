"""The memory that a step needs on each GPU, computed for several models and ways to spread them; nothing is measured.

    python -m benchmarking.scaling --report docs/scaling.md,docs/scaling_zh.md
    python -m benchmarking.scaling --cards 8,12,16,24,48,80 --report README.md,README_zh.md

Weights are counted from the models' shapes, what the backward pass keeps by `kept_bytes`. The arithmetic stands in
`memory`.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from benchmarking.kept_bytes import per_token_and_layer
from benchmarking.pages import find_pages, write_table
from benchmarking.shapes import SHAPES, make_config
from finetuning.cli.arguments import ScriptParser, flag
from finetuning.cli.console import say
from finetuning.cli.memory import GIB
from finetuning.training.losses import LOGITS_MEMORY

HALF = 2  # bytes of a weight in float16 or bfloat16
# Bytes of a weight in NF4 with double quantisation: 4 bits, 1 byte for each 64 weights, 4 bytes for each 64 x 256.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER = 16  # bytes of a trained weight: itself, its gradient and the two numbers of AdamW, in float32
LORA_RANK = 8
VIRTUAL_TOKENS = 20
CONTEXT = 0.5  # GiB that CUDA itself takes
USABLE = 0.95  # of a GPU's memory: PyTorch keeps some between its tensors, and a card of 24 GB has a little less
LARGE = "qwen2.5-7b,qwen2.5-14b,qwen2.5-32b,qwen2.5-72b"


@dataclass
class ScalingArguments:
    _argument_group_name = "scaling"

    shapes: str | None = flag(None, "of released models, commas between (default: from 7b; with --cards: all)")
    gpus: int = flag(8, "over which FSDP or ZeRO-3 divides the weights")
    cards: str | None = flag(None, "GiB of single GPUs, commas between: which models fit, in a table of its own")
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


class Size(NamedTuple):
    """How many weights a model has, and in which parts."""

    layers: int
    layer: int  # weights of one
    matrices: int  # of them in matrices, which 4 bits reach
    largest: int  # of these
    vocabulary: int  # weights of the embeddings, and as many of lm_head
    lora: int  # of LoRA on q_proj, k_proj and v_proj
    prompt: int = 0  # of a soft prompt
    tied: bool = False  # whether lm_head is the embeddings

    def weights(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.vocabulary


@cache
def measure_shape(shape: str) -> Size:
    """Count the weights of a released model; none of them is made."""
    config = make_config(shape, 1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    adapted = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    layers = SHAPES[shape]["num_hidden_layers"]
    return Size(
        layers=layers,
        layer=sum(parameter.numel() for parameter in layer.parameters()),
        matrices=sum(module.weight.numel() for module in linear),
        largest=max(module.weight.numel() for module in linear),
        vocabulary=model.get_input_embeddings().weight.numel(),
        lora=layers * LORA_RANK * sum(module.in_features + module.out_features for module in adapted),
        prompt=VIRTUAL_TOKENS * config.hidden_size,
        tied=config.tie_word_embeddings,
    )


def memory(size: Size, kept: float, tokens: int, gpus: int, in_4bit: bool, trained: int) -> tuple[float, float]:
    """Bytes of the weights on a GPU, and of all that a step needs there; without the CUDA context, about 0.5 GiB.

    Args:
        kept: bytes for each token and layer that the backward pass needs; with checkpointing, those of the layers'
            inputs, and the caller adds one whole layer.
        gpus: over which the weights are divided; 1 for a whole copy.
        trained: weights.
    """
    layer = size.matrices * NF4 + (size.layer - size.matrices) * HALF if in_4bit else size.layer * HALF
    weights = (size.layers * layer + (1 if size.tied else 2) * size.vocabulary * HALF) / gpus
    # divided weights are put together for two layers, the one at work and the next, and for lm_head
    together = 2 * layer + size.vocabulary * HALF if gpus > 1 else 0
    unpacked = size.largest * HALF if in_4bit else 0
    logits = 2 * LOGITS_MEMORY
    return weights, weights + together + unpacked + logits + kept * tokens * size.layers + trained * OPTIMIZER


def step_memory(
    shape: str, method: str, in_4bit: bool, checkpointing: bool, tokens: int, gpus: int = 1
) -> tuple[float, float]:
    """`memory` of a released model with the method `lora` or `prompt_tuning`."""
    size = measure_shape(shape)
    kept = per_token_and_layer(shape, method, checkpointing)
    if checkpointing:  # one layer is computed again at a time
        kept += per_token_and_layer(shape, method) / size.layers
    return memory(size, kept, tokens, gpus, in_4bit, size.lora if method == "lora" else size.prompt)


def make_table(shapes: list[str], tokens: int, gpus: int) -> str:
    """A Markdown table, in GiB on each GPU."""
    lines = [
        "| model | precision | weights | of them on a GPU | LoRA | checkpointed | prompt tuning | checkpointed |",
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
                name = "whole (DDP)" if count == 1 else f"divided by {count} (FSDP, ZeRO-3)"
                kind = "4-bit" if in_4bit else "16-bit"
                cells = [f"{total / GIB:.1f}" for _, total in needed]
                lines.append(f"| {shape} | {kind} | {name} | {needed[0][0] / GIB:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest_that_fits(
    card: int, shapes: list[str], method: str, in_4bit: bool, checkpointing: bool, tokens: int
) -> str:
    """The size in the name of the largest model that a GPU of `card` GiB can train, "none" if there is none."""
    needed = {shape: step_memory(shape, method, in_4bit, checkpointing, tokens)[1] / GIB + CONTEXT for shape in shapes}
    fits = [shape for shape, total in needed.items() if total <= USABLE * card]
    return max(fits, key=lambda shape: measure_shape(shape).weights()).split("-")[1].upper() if fits else "none"


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
    size = measure_shape("qwen2.5-7b")
    lora, prompt = (f"{count:,} ({100 * count / size.weights():.4f}%)" for count in (size.lora, size.prompt))
    lines.append(f"| a 7B trains | {lora} | {lora} | {prompt} | {prompt} |")
    return "\n".join(lines)


def main() -> None:
    (args,) = ScriptParser((ScalingArguments,), __doc__).parse()
    pages = find_pages(args.report, "memory")
    shapes = args.shapes.split(",")
    if args.cards:
        table = make_cards_table([int(card) for card in args.cards.split(",")], shapes, args.tokens)
    else:
        table = make_table(shapes, args.tokens, args.gpus)
    say(table)
    write_table(pages, "memory", table)


if __name__ == "__main__":
    main()
