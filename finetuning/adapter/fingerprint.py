"""The fingerprint of a base model: an adapter only works on the base model that it was trained on."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def base_fingerprint(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The sizes of a base model, and a sample of the weights that no quantisation changes.

    The sample holds values, not a hash, because the same checkpoint may be loaded in float16 or in float32.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    embedding = base.get_input_embeddings().weight
    # norms and biases, which also differ between a base model and its instruct version
    vectors = torch.cat(
        [p.detach().float().cpu() for name, p in base.named_parameters() if p.ndim == 1 and "lora_" not in name]
    )
    return {
        "sizes": {name: getattr(config, name, None) for name in SIZES},
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "weights": " ".join(f"{value:.7g}" for value in [*sample(embedding), *sample(vectors)]),
    }


def sample(tensor: torch.Tensor, count: int = 64) -> list[float]:
    """`count` values of a tensor, evenly spaced."""
    index = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long().to(tensor.device)
    return tensor.detach().flatten()[index].float().tolist()


def compare_fingerprints(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """How a base model (`found`) differs from the one that an adapter was trained on (`saved`); None if it does not."""
    for name, value in saved["sizes"].items():
        if found["sizes"].get(name) != value:
            return f"{name} is {found['sizes'].get(name)}, and was {value}"
    # bfloat16 keeps 8 bits of a number; float16 holds nothing finer than 6e-8
    tolerance = 1e-6 if saved["dtype"] == found["dtype"] else 2**-8
    values, other = (torch.tensor([float(word) for word in side["weights"].split()]) for side in (saved, found))
    if values.shape != other.shape or not torch.allclose(other, values, rtol=tolerance, atol=1e-7):
        return "it has the same shape but other weights"
    return None


def quantization(model: PreTrainedModel | PeftModel) -> str | None:
    """ "nf4" if the base weights are in 4 bits, None if they are in 16 or 32."""
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else None  # transformers sets it only on such models
