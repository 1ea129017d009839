"""The adapter folder: what is saved in it, and what is compared when it is loaded.

adapter_model.safetensors, adapter_config.json    the adapter as PEFT writes it
chat_template.jinja                               the prompt format it was trained with
adapter_info.json                                 what inference must match: base model, quantisation, stop tokens
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from console import fail, first_line, is_disk_error, resume_command, warn
from soft_prompts import SoftPromptModel

WEIGHTS, CONFIG, TEMPLATE, INFO = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "chat_template.jinja",
    "adapter_info.json",
)
KINDS = ("LORA", "PROMPT_TUNING")
NEEDED = ("base_model", "base_fingerprint", "quantization", "prompt_format", "stop_token_ids")  # of adapter_info.json
SCRATCH = ".saving"  # how the names of folders begin in which something is being written
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
    """What tells one base model from another: its sizes and a sample of the weights that no quantisation touches.

    The sample is of values, not a hash, because one checkpoint may be loaded in float16 here and in float32 there.
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
    """How the base model found differs from the one the adapter was trained on, or None."""
    for name, value in saved["sizes"].items():
        if found["sizes"].get(name) != value:
            return f"{name} is {found['sizes'].get(name)}, and was {value}"
    # bfloat16 keeps 8 bits of a number; float16 holds nothing finer than 6e-8
    tolerance = 1e-6 if saved["dtype"] == found["dtype"] else 2**-8
    values, other = (torch.tensor([float(word) for word in side["weights"].split()]) for side in (saved, found))
    if values.shape != other.shape or not torch.allclose(other, values, rtol=tolerance, atol=1e-7):
        return "it has the same shape but other weights"
    return None


def describe_run(data_path: str) -> dict[str, Any]:
    """How this run can be repeated: command, data, versions."""
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "data_sha256": hashlib.sha256(Path(data_path).read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in libraries},
    }


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy on the CPU of the tensors that make up the adapter, under the names they are saved with."""
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def save_adapter(model: PeftModel, output_dir: str, start: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    """Check the trained adapter, write it beside its place, read it back, and only then put it in its place.

    Args:
        start: `adapter_state` before training; an adapter equal to it has learnt nothing.
        files: texts to save beside the weights, by name.

    Raises:
        SystemExit: code 1, and nothing is saved, where the adapter is not finite or has blown up, did not change, or
            does not reload.
    """
    state = adapter_state(model)
    if not all(tensor.half().isfinite().all() for tensor in state.values()):
        fail(
            "the adapter holds weights that are NaN, infinite or too large for float16 (65,504): it is not saved.\n"
            "Try --bf16 True or a lower --learning_rate",
            1,
        )
    if all(torch.equal(tensor, start[name]) for name, tensor in state.items()):
        fail("training changed nothing in the adapter: it is not saved. Is --learning_rate 0?", 1)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=output_dir))
    try:
        model.save_pretrained(scratch)
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        saved = load_file(scratch / WEIGHTS)
        if saved.keys() != state.keys() or not all(torch.equal(saved[name], state[name]) for name in state):
            fail(f"{WEIGHTS} does not hold what was trained when it is read back; is the disk sound?", 1)
        shutil.copymode(scratch / INFO, scratch / WEIGHTS)  # safetensors lets no one else read them
        # the weights last: where they are, the folder is whole
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == WEIGHTS):
            os.replace(file, Path(output_dir, file.name))
    except (OSError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        free = shutil.disk_usage(output_dir).free / 2**20
        fail(
            f"the adapter can not be written: {free:.1f} MB are free on its disk ({first_line(error)}).\n"
            f"Make room, and go on from the last checkpoint with: {resume_command()}",
            1,
        )
    finally:
        shutil.rmtree(scratch)


def read_adapter(adapter_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check that a folder holds a whole adapter with finite weights, and read its two JSON files.

    Returns:
        PEFT's configuration, and the contents of adapter_info.json ({} for an adapter that another program wrote).
    """
    folder = Path(adapter_path)
    if not folder.is_dir():
        fail(f"adapter folder '{adapter_path}' does not exist; --adapter_path names the --output_dir of a training run")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            hint = f"; it holds a checkpoint: --adapter_path {checkpoints[-1]}" if checkpoints else ""
            fail(f"'{adapter_path}' holds no {name}: it is not a finished adapter{hint}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        info = json.loads((folder / INFO).read_text(encoding="utf-8")) if (folder / INFO).is_file() else {}
    except ValueError as error:
        fail(f"'{adapter_path}': a JSON file of the adapter is broken ({error}); copy it again or train it again")
    missing = [name for name in NEEDED if info and name not in info]
    if missing:
        fail(f"'{adapter_path}': {INFO} is broken: it has no {', '.join(missing)}; copy it again or train it again")
    if config.get("peft_type") not in KINDS or config.get("megatron_config"):  # which names Python code to import
        kind = config.get("peft_type")
        fail(f"'{adapter_path}' is an adapter of kind {kind}; only {' and '.join(KINDS)} are loaded here")
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        fail(f"'{adapter_path}': {WEIGHTS} is broken ({error}); copy it again or train it again")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail(
            f"'{adapter_path}' holds NaN or infinite weights; train it again with --bf16 True or a lower learning rate"
        )
    return config, info


def load_adapter(model: PreTrainedModel, adapter_path: str, info: dict[str, Any]) -> PeftModel:
    """Attach a saved adapter to its base model, for inference.

    Raises:
        SystemExit: code 2, where the base model is not the one the adapter was trained on. Another quantisation than
            in training only gives a warning.
    """
    if info:
        difference = compare_fingerprints(info["base_fingerprint"], base_fingerprint(model))
        if difference:
            fail(
                f"'{adapter_path}' was trained on another base model ({info['base_model']}): {difference}.\n"
                "Name the base model it was trained on with --model_path"
            )
        quantization = "nf4" if getattr(model, "is_loaded_in_4bit", False) else None
        if quantization != info["quantization"]:
            names = {"nf4": "4-bit", None: "16 or 32 bits"}
            warn(
                f"the adapter was trained on a base model in {names[info['quantization']]} and now runs on "
                f"one in {names[quantization]}; its answers may be a little worse"
            )
    try:
        config = PeftConfig.from_pretrained(adapter_path)
        config.inference_mode = True
        if config.peft_type == PeftType.PROMPT_TUNING:
            model = SoftPromptModel(model, config)
            model.load_adapter(adapter_path, "default")
        else:
            model = PeftModel.from_pretrained(model, adapter_path, config=config)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # what PEFT says of names and shapes that the model has not
        fail(f"'{adapter_path}' does not fit this base model: {' '.join(str(error).split())[:300]}")
    return model.eval()
