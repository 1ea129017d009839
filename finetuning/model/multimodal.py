"""Adapters of a multimodal class, such as Qwen3_5ForConditionalGeneration, and of its text part.

There the layers are `model.language_model.layers`, in the text part, which is trained here, `model.layers`. An adapter
under the wrong names has no effect, and most programs do not say so.
"""

import re
from pathlib import Path

from peft import PeftConfig, PeftType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the adapter's weights in PEFT
MULTIMODAL_PREFIX, TEXT_PREFIX = "model.language_model.", "model."


def is_multimodal(architectures: list[str] | None) -> bool:
    """Whether a checkpoint is of a multimodal class, by the `architectures` of its configuration."""
    return bool(architectures) and architectures[0].endswith("ForConditionalGeneration")


def find_modules(names: list[str]) -> set[str]:
    """The full names of the modules that a LoRA adapter has weights for."""
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}


def map_to_text_part(model: PreTrainedModel, config: PeftConfig, adapter_path: str) -> dict[str, str] | None:
    """Make a LoRA adapter of a multimodal class fit the text part.

    In `config`, the target modules, which may be a regular expression on the other names, become the modules that the
    adapter has weights for.

    Returns:
        Patterns of weight names and what replaces them; None if the adapter needs none.
    """
    with safe_open(Path(adapter_path, WEIGHTS), "pt") as weights:
        names = list(weights.keys())
    multimodal = any(MULTIMODAL_PREFIX in name for name in names)
    if not multimodal or config.peft_type != PeftType.LORA:
        return None
    config.target_modules = {module.replace(MULTIMODAL_PREFIX, TEXT_PREFIX) for module in find_modules(names)}
    return {re.escape(MULTIMODAL_PREFIX): TEXT_PREFIX}


def write_for_multimodal(adapter_path: str, output_dir: str) -> None:
    """Write weights and configuration of a LoRA adapter of the text part so that they fit the multimodal class."""
    state = {
        name.replace(PREFIX + TEXT_PREFIX, PREFIX + MULTIMODAL_PREFIX, 1): tensor
        for name, tensor in load_file(Path(adapter_path, WEIGHTS)).items()
    }
    config = PeftConfig.from_pretrained(adapter_path)
    config.target_modules = find_modules(list(state))  # names such as q_proj could also be in the vision part
    config.save_pretrained(output_dir)
    save_file(state, Path(output_dir, WEIGHTS), metadata={"format": "pt"})
