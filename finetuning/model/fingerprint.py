"""The fingerprint of a base model: an adapter only works on the base model that it was trained on."""

import json
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from finetuning.distributed import gathered, whole_shape

# Fields of a configuration that do not change what a model computes from given tokens, or that its weights show. All
# others are compared, such as the rotation.
NOT_COMPARED = {*PreTrainedConfig().to_dict(), "quantization_config", "use_cache", "tie_word_embeddings"}
NOT_COMPARED |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
NOT_COMPARED |= {"attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"}
NOT_COMPARED -= {"model_type"}
# How LoRA may begin (`init_lora_weights`) by taking its first values out of the base weights, which PEFT changes then.
CHANGES_BASE = ("pissa", "olora")
# Two matrices are the same if their samples point the same way: 4-bit weights reach 0.99, unrelated ones rarely 0.5.
SAME_MATRIX = 0.9


def base_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of a base model without adapter, a sample of the weights that no quantisation changes, and one
    of each kind of matrix.

    The samples hold values, not a hash, because the same checkpoint may be loaded in float16, in float32 or in 4 bits.
    """
    config = json.loads(json.dumps(model.config.get_text_config().to_dict(), default=str))  # as it is read again
    embedding = model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    # norms and biases, which also differ between a base model and its instruct version
    vectors = [parameter for parameter in parameters.values() if len(whole_shape(parameter)) == 1]
    # the last matrix of each kind, such as q_proj or experts.down_proj
    matrices = {
        ".".join(name.removesuffix(".weight").split(".")[-2:]): parameter
        for name, parameter in parameters.items()
        if len(whole_shape(parameter)) > 1 and "layers." in name
    }
    with gathered([embedding, *vectors, *matrices.values()]):
        return {
            "config": {name: value for name, value in config.items() if name not in NOT_COMPARED},
            "dtype": str(embedding.dtype).removeprefix("torch."),
            "weights": write([*sample(embedding), *sample(torch.cat([p.detach().float().cpu() for p in vectors]))]),
            "matrices": {kind: write(sample(dequantized(matrix))) for kind, matrix in matrices.items()},
        }


def changes_base(model: PeftModel) -> bool:
    """Whether the adapter has changed the weights of its base model."""
    return getattr(model.peft_config["default"], "init_lora_weights", None) in CHANGES_BASE


def dequantized(parameter: torch.nn.Parameter) -> torch.Tensor:
    return dequantize_4bit(parameter.data, parameter.quant_state) if isinstance(parameter, Params4bit) else parameter


def write(values: list[float]) -> str:
    return " ".join(f"{value:.7g}" for value in values)


def read(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()])


def sample(tensor: torch.Tensor, count: int = 64) -> list[float]:
    """`count` values of a tensor, evenly spaced."""
    index = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long().to(tensor.device)
    return tensor.detach().flatten()[index].float().tolist()


def compare_fingerprints(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """How a base model (`found`) differs from the one that an adapter was trained on (`saved`); None if it does not.

    Compared are the fields of the configuration that both have: other versions of transformers have other ones, and
    older adapters have `sizes`, a few of them.
    """
    for name, value in saved.get("config", saved.get("sizes", {})).items():
        if found["config"].get(name, value) != value:
            return f"{name} is {found['config'][name]}, and was {value}"
    # bfloat16 keeps 8 bits of a number; float16 holds nothing finer than 6e-8
    tolerance = 1e-6 if saved["dtype"] == found["dtype"] else 2**-8
    values, other = read(saved["weights"]), read(found["weights"])
    if values.shape != other.shape or not torch.allclose(other, values, rtol=tolerance, atol=1e-7):
        return "it has the same shape but other weights"
    for kind, text in saved.get("matrices", {}).items():  # older adapters have none
        values, other = read(text), read(found["matrices"].get(kind, ""))
        if values.shape != other.shape or torch.cosine_similarity(values, other, dim=0) < SAME_MATRIX:
            return f"it has other weights in {kind}"
    return None


def quantization(model: PreTrainedModel | PeftModel) -> str | None:
    """ "nf4" if the base weights are in 4 bits, None if they are in 16 or 32."""
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else None  # transformers sets it only on such models
