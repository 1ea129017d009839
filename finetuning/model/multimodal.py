"""Adapters of a class with vision, such as Qwen3_5ForConditionalGeneration, and of its text part.

There the layers are `model.language_model.layers`, in the text part, which is trained here, `model.layers`. An adapter
under the wrong names has no effect, and most programs do not say so.
"""

import re
import shutil
from pathlib import Path

from peft import PeftConfig, PeftType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the adapter's weights in PEFT
WHOLE, TEXT = "model.language_model.", "model."


def find_modules(names: list[str]) -> set[str]:
    """The full names of the modules that a LoRA adapter has weights for."""
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}


def map_to_text_part(model: PreTrainedModel, config: PeftConfig, adapter_path: str) -> dict[str, str] | None:
    """Make a LoRA adapter of a whole class fit the text part.

    In `config`, the target modules, which may be a regular expression on the other names, become the modules that the
    adapter has weights for.

    Returns:
        Patterns of weight names and what replaces them; None if the adapter needs none.
    """
    with safe_open(Path(adapter_path, WEIGHTS), "pt") as weights:
        names = list(weights.keys())
    whole = any(WHOLE in name for name in names) and not any(WHOLE in name for name, _ in model.named_modules())
    if not whole or config.peft_type != PeftType.LORA:
        return None
    config.target_modules = {module.replace(WHOLE, TEXT) for module in find_modules(names)}
    return {re.escape(WHOLE): TEXT}


def write_for_whole_class(adapter_path: str, output_dir: str) -> None:
    """Write a LoRA adapter of the text part, with all of its files, so that it fits the whole class."""
    shutil.copytree(adapter_path, output_dir, dirs_exist_ok=True)
    state = {
        name.replace(PREFIX + TEXT, PREFIX + WHOLE, 1): tensor
        for name, tensor in load_file(Path(adapter_path, WEIGHTS)).items()
    }
    config = PeftConfig.from_pretrained(adapter_path)
    config.target_modules = find_modules(list(state))  # names such as q_proj could also be in the vision part
    config.save_pretrained(output_dir)
    save_file(state, Path(output_dir, WEIGHTS), metadata={"format": "pt"})
