"""Models of released shapes with random weights, and random rows: nothing is downloaded, and the speed is the same."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from finetuning.cli.arguments import beside_scripts

# Sizes of released models, from their config.json on the Hugging Face hub.
SHAPES = {
    name: dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "vocab_size", "tie_word_embeddings"), sizes, strict=True))
    for name, sizes in {
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
        "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
        "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False),
        "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False),
        "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False),
        "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
        "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, True),
        "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
        "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
    }.items()
}  # fmt: skip
TOKENIZER = beside_scripts("models/tiny-qwen")  # its ids are in the vocabulary of every shape


def make_config(shape: str, layers: int | None = None, **changes: int) -> PreTrainedConfig:
    """The configuration of a released model, with only so many of its layers if `layers` is given."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}) | changes
    family = shape.split("-")[0].removesuffix(".5")
    sizes |= {"head_dim": 128} if family == "qwen3" else {}
    return AutoConfig.for_model(family, max_position_embeddings=32768, **sizes)


def make_random_checkpoint(shape: str, layers: int | None, folder: str) -> None:
    """Write a model of the shape with random weights, and a tokenizer.

    The weights come from models of one layer, initialised as their class does it, so that no more than the vocabulary
    and one layer is in memory.
    """
    config = make_config(shape, layers)
    device, config.dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    files = {}
    for layer in range(config.num_hidden_layers):
        small = {} if layer == 0 else {"vocab_size": 8}  # the vocabulary comes from the first of the models
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(make_config(shape, 1, **small), dtype=config.dtype)
        weights = {name: tensor for name, tensor in model.state_dict().items() if layer == 0 or ".layers.0." in name}
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        weights = {name.replace(".layers.0.", f".layers.{layer}."): tensor for name, tensor in weights.items()}
        file = f"model-{layer + 1:05}-of-{config.num_hidden_layers:05}.safetensors"
        save_file(weights, Path(folder, file), metadata={"format": "pt"})
        files |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": files}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def random_rows(count: int, length: int) -> Dataset:
    """Rows of `length` random tokens, all of which are supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 4000, (count, length), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "length": length} for row in ids])
