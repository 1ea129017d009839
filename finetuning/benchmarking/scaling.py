"""The memory that a step needs on each GPU, computed for several models and ways to spread them; nothing is measured.

    python -m finetuning.benchmarking.scaling --report docs/scaling.md,docs/scaling_zh.md

Weights are counted from the models' shapes, what the backward pass keeps by `kept_bytes`. The arithmetic stands in
`memory`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from finetuning.benchmarking.kept_bytes import per_token_and_layer
from finetuning.benchmarking.shapes import SHAPES, make_config
from finetuning.cli.arguments import ScriptParser, flag
from finetuning.cli.console import fail, say
from finetuning.cli.memory import GIB
from finetuning.training.losses import LOGITS_MEMORY

HALF = 2  # bytes of a weight in float16 or bfloat16
# Bytes of a weight in NF4 with double quantisation: 4 bits, 1 byte for each 64 weights, 4 bytes for each 64 x 256.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER = 16  # bytes of a trained weight: itself, its gradient and the two numbers of AdamW, in float32
LORA_RANK = 8
MARKS = re.compile("(?<=<!-- memory -->\n).*?(?=<!-- /memory -->)", re.DOTALL)


@dataclass
class ScalingArguments:
    _argument_group_name = "scaling"

    shapes: str = flag("qwen2.5-7b,qwen2.5-14b,qwen2.5-32b,qwen2.5-72b", "of released models, commas between")
    gpus: int = flag(8, "over which FSDP or ZeRO-3 divides the weights")
    tokens: int = flag(1024, "of the rows that a GPU gets at once")
    report: str | None = flag(
        None, "files, commas between, that get the table between their lines <!-- memory --> and <!-- /memory -->"
    )

    def __post_init__(self) -> None:
        unknown = [shape for shape in self.shapes.split(",") if shape not in SHAPES]
        if unknown:
            raise ValueError(f"--shapes {','.join(unknown)}: choose from {', '.join(SHAPES)}")


class Size(NamedTuple):
    """How many weights a model has, and in which parts."""

    layers: int
    layer: int  # weights of one
    matrices: int  # of them in matrices, which 4 bits reach
    largest: int  # of these
    vocabulary: int  # weights of the embeddings, and as many of lm_head
    lora: int  # of LoRA on q_proj, k_proj and v_proj


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
    weights = (size.layers * layer + 2 * size.vocabulary * HALF) / gpus
    # divided weights are put together for two layers, the one at work and the next, and for lm_head
    together = 2 * layer + size.vocabulary * HALF if gpus > 1 else 0
    unpacked = size.largest * HALF if in_4bit else 0
    logits = 2 * LOGITS_MEMORY
    return weights, weights + together + unpacked + logits + kept * tokens * size.layers + trained * OPTIMIZER


def make_table(shapes: list[str], tokens: int, gpus: int) -> str:
    """A Markdown table, in GiB on each GPU."""
    lines = [
        "| model | precision | weights | of them on a GPU | LoRA | checkpointed | prompt tuning | checkpointed |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for shape in shapes:
        size = measure_shape(shape)
        kept = {
            (method, on): per_token_and_layer(shape, method, on)
            for method in ("lora", "prompt_tuning")
            for on in (False, True)
        }
        for in_4bit in (False, True):
            for count in (1, gpus):
                cells = []
                for (method, on), bytes_kept in kept.items():
                    trained = size.lora if method == "lora" else 0
                    # with checkpointing one layer is computed again at a time
                    bytes_kept += kept[method, False] / size.layers if on else 0
                    weights, total = memory(size, bytes_kept, tokens, count, in_4bit, trained)
                    cells.append(f"{total / GIB:.1f}")
                name = "whole (DDP)" if count == 1 else f"divided by {count} (FSDP, ZeRO-3)"
                kind = "4-bit" if in_4bit else "16-bit"
                lines.append(f"| {shape} | {kind} | {name} | {weights / GIB:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = ScriptParser((ScalingArguments,), __doc__)
    (args,) = parser.to_dataclasses(parser.parse_flags())
    reports = args.report.split(",") if args.report else []
    for file in reports:
        if not Path(file).is_file() or len(MARKS.findall(Path(file).read_text(encoding="utf-8"))) != 1:
            fail(f"--report '{file}' is not a file with one line <!-- memory --> and, below, one <!-- /memory -->")
    table = make_table(args.shapes.split(","), args.tokens, args.gpus)
    say(table)
    for file in reports:
        before = Path(file).read_text(encoding="utf-8")
        Path(file).write_text(MARKS.sub(lambda _: f"\n{table}\n\n", before), encoding="utf-8")


if __name__ == "__main__":
    main()
