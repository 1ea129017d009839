"""The adapter folder: what is saved in it, and what is compared when it is loaded.

adapter_model.safetensors, adapter_config.json    the adapter as PEFT writes it
chat_template.jinja                               the prompt format it was trained with
adapter_info.json                                 what inference must match: base model, quantisation, stop tokens
metrics.json, confusion.png                       scores on the evaluation rows, if there are any
training_report.json, loss.png, README.md         how it was made: the whole run, its losses, and the model card
"""

import copy
import json
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.cli.commands import command_line, resume_command
from finetuning.cli.console import fail, first_line, is_disk_error, say, warn
from finetuning.cli.memory import is_out_of_memory
from finetuning.distributed import gathered, whole_copy
from finetuning.model.base_model import describe_broken, has_tokenizer, is_hub_name, newest_folder, read_tokenizer
from finetuning.model.fingerprint import base_fingerprint, compare_fingerprints, quantization
from finetuning.model.multimodal import WEIGHTS, map_to_text_part
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import stop_token_ids
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import is_thinking, prompt_format, set_thinking, supports_thinking_switch

CONFIG, TEMPLATE, INFO, METRICS = "adapter_config.json", "chat_template.jinja", "adapter_info.json", "metrics.json"
CONFUSION = "confusion.png"
REPORT, CURVE, CARD = "training_report.json", "loss.png", "README.md"
KINDS = ("LORA", "PROMPT_TUNING")
NEEDED = ("base_model", "base_fingerprint", "quantization", "prompt_format", "stop_token_ids")  # of adapter_info.json
NO_EFFECT = "changes nothing: all its B matrices are 0; it was not trained, or not saved as a whole"
SCRATCH = ".saving"  # prefix of folders still being written
RESUME = "Make room, and resume from the last checkpoint with:"


def describe_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    summary: Summary,
    labels: dict[str, list[str]],
    settings: dict[str, Any],
) -> dict[str, str]:
    """The texts to save beside an adapter's weights, by file name: its prompt format, and what inference must match.

    Args:
        model: whose base has its `fingerprint`, from `load_model`: the adapter may have changed it.
        summary: of the training rows.
        labels: the label words of each task in them.
        settings: of the run, which a resumed run must share.
    """
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    info = {
        "base_model": model.get_base_model().name_or_path,
        "model_class": type(model.get_base_model()).__name__,
        "base_fingerprint": model.get_base_model().fingerprint,
        "quantization": quantization(model),
        "prompt_format": prompt_format(tokenizer),
        "stop_token_ids": stop_token_ids(tokenizer),
        "thinking": summary.mostly_reasoning(),
        "labels": labels,
        "command": command_line(),
        "data_sha256": summary.sha256,
        "tokens": [summary.tokens, summary.supervised],  # as the tokenizer and the chat template make them
        "settings": settings,
        "versions": {name: version(name) for name in libraries},
    }
    return {TEMPLATE: tokenizer.chat_template, INFO: json.dumps(info, ensure_ascii=False, indent=2) + "\n"}


def choose_thinking(tokenizer: PreTrainedTokenizerBase, summary: Summary, wanted: str) -> None:
    """Put the chat template, which is saved with the adapter, into the mode that most rows are in, or that is wanted.

    Args:
        summary: of the training rows.
        wanted: `--thinking`: auto, on or off.
    """
    if wanted == "on" and not summary.reasoning:
        fail(f"--thinking on: no row of {summary.path} has reasoning to learn; leave the flag out")
    set_thinking(tokenizer, wanted == "on" or summary.mostly_reasoning())
    if summary.reasoning and supports_thinking_switch(tokenizer):
        say(f"the adapter will be asked to answer {'after' if is_thinking(tokenizer) else 'without'} reasoning")


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy on the CPU of the adapter's tensors, under the names they are saved with. All processes must call it."""
    with gathered(parameter for parameter in model.parameters() if parameter.requires_grad):
        return {
            name: whole_copy(tensor)
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }


def write_adapter(model: PeftModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what PEFT's `save_pretrained` would, but from the tensors of `adapter_state`: one process is enough."""
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    config.inference_mode = True
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def save_adapter(
    model: PeftModel,
    state: dict[str, torch.Tensor],
    output_dir: str,
    start: dict[str, torch.Tensor],
    files: dict[str, str],
) -> None:
    """Check the trained adapter, write it into a scratch folder, read it back, and only then move it to `output_dir`.

    Args:
        state: `adapter_state` after training.
        start: `adapter_state` before training; an adapter equal to it is untrained.
        files: texts to save beside the weights, by name, from `describe_adapter`.

    Raises:
        SystemExit: code 1, and nothing is saved, if the adapter is not finite or too large for float16, did not change,
            or reads back differently.
    """
    if not all(tensor.half().isfinite().all() for tensor in state.values()):
        fail(
            "the adapter holds weights that are NaN, infinite or too large for float16 (65,504): it is not saved.\n"
            "Try --bf16 True or a lower --learning_rate",
            1,
        )
    if all(torch.equal(tensor, start[name]) for name, tensor in state.items()):
        fail("training changed nothing in the adapter: it is not saved. Was the learning rate 0?", 1)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=output_dir))
    try:
        write_adapter(model, state, scratch)
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        saved = load_file(scratch / WEIGHTS)
        if saved.keys() != state.keys() or not all(torch.equal(saved[name], state[name]) for name in state):
            fail(f"{WEIGHTS} does not hold what was trained when it is read back; is the disk sound?", 1)
        shutil.copymode(scratch / INFO, scratch / WEIGHTS)  # safetensors gives only the owner access
        flush_to_disk(scratch)
        # the weights last, and no older ones meanwhile: if they are there, the folder is complete
        Path(output_dir, WEIGHTS).unlink(missing_ok=True)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == WEIGHTS):
            os.replace(file, Path(output_dir, file.name))
    except (OSError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        fail(f"{describe_disk_error(scratch.parent, error)}\n{RESUME} {resume_command()}", 1)
    finally:
        shutil.rmtree(scratch)


def describe_disk_error(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(folder.parent).free / 2**20
    return f"{folder} cannot be written: {free:.1f} MB are free on its disk ({first_line(error)})."


def flush_to_disk(folder: Path) -> None:
    """Wait until the files of a folder are on the disk, so that a power cut cannot take their contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if os.name != "nt":  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the latest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=step_of_name, reverse=True)


def step_of_name(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find_broken_part(folder: Path) -> str | None:
    """The first file that a checkpoint lacks, or that is not as long as it was; None for a complete checkpoint."""
    try:
        sizes = json.loads((folder / INFO).read_text(encoding="utf-8")).get("files", {})  # older ones list none
        found = {name: (folder / name).stat().st_size for name in dict(sizes) if (folder / name).is_file()}
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{INFO} is missing or broken"
    broken = [name for name, size in sizes.items() if found.get(name) != size]
    return f"{broken[0]} is {'broken' if broken[0] in found else 'missing'}" if broken else None


def last_complete(output_dir: str | Path) -> Path | None:
    return next((path for path in find_checkpoints(output_dir) if not find_broken_part(path)), None)


def find_adapter(adapter_path: str) -> str:
    """The folder of an adapter, which is downloaded if it is named as on the hub."""
    if Path(adapter_path).is_dir():
        return adapter_path
    if not is_hub_name(adapter_path):
        fail(
            f"adapter folder '{adapter_path}' does not exist; name the folder that a training run has saved,\n"
            "or ask the base model alone with --model_path"
        )
    try:
        return snapshot_download(adapter_path, ignore_patterns=["checkpoint-*", "*.bin", "*.pt"])
    except (OSError, ValueError, ImportError) as error:
        fail(f"adapter '{adapter_path}' is no folder here, and cannot be downloaded: {first_line(error)}")


def read_adapter(adapter_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check that a folder holds a complete adapter with finite weights, and read its two JSON files.

    Returns:
        PEFT's configuration, and the contents of adapter_info.json ({} for an adapter that another program wrote).
    """
    folder = Path(adapter_path)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        inside = last_complete(folder) or newest_folder(folder, CONFIG)
        hint = f"; perhaps you mean --adapter_path {inside}" if inside else ""
        if (folder / "config.json").is_file():
            hint = f"; it is a whole model: ask it with --model_path {adapter_path}"
        elif (folder / "adapter_model.bin").is_file():
            hint = "; it has pickled weights (.bin), which can run code: save them as safetensors where they come from"
        fail(f"'{adapter_path}' holds no {missing[0]}: it is not a finished adapter{hint}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        info = json.loads((folder / INFO).read_text(encoding="utf-8")) if (folder / INFO).is_file() else {}
        if not isinstance(config, dict) or not isinstance(info, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        fail(f"'{adapter_path}': a JSON file of the adapter is broken ({error}); copy it again or train it again")
    missing = [name for name in NEEDED if info and name not in info]
    if missing:
        fail(f"'{adapter_path}': {INFO} is broken: it has no {', '.join(missing)}; copy it again or train it again")
    if config.get("peft_type") not in KINDS or config.get("megatron_config"):  # this names Python code to import
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
    if changes_nothing(weights):
        warn(f"'{adapter_path}' {NO_EFFECT}")
    if not info:
        warn(f"'{adapter_path}' was not saved by this project: prompt format and base model cannot be checked")
    return config, info


def changes_nothing(weights: dict[str, torch.Tensor]) -> bool:
    """Whether all that an adapter adds is 0: of LoRA the B matrices, and what else it holds beside its A matrices."""
    return not any(tensor.any() for name, tensor in weights.items() if not re.search("lora_(embedding_)?A", name))


def own_tokenizer(
    adapter_path: str, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer of an adapter, if it has one, or else that of its base model, whose template it may lack."""
    if not has_tokenizer(Path(adapter_path)):
        return tokenizer
    own = read_tokenizer(adapter_path, trust_remote_code, "--adapter_path")
    own.chat_template = own.chat_template or tokenizer.chat_template
    return own


def use_trained_format(tokenizer: PreTrainedTokenizerBase, adapter_path: str) -> None:
    """Give the tokenizer the chat template that the adapter was trained with, if it is saved: in a file of its own or,
    as transformers 4 does it, in tokenizer_config.json."""
    template, config = Path(adapter_path, TEMPLATE), Path(adapter_path, "tokenizer_config.json")
    saved = template.read_text(encoding="utf-8") if template.is_file() else None
    if saved is None and config.is_file():
        try:
            saved = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError):
            fail(f"--adapter_path '{adapter_path}' {describe_broken(config)}")
    if isinstance(saved, list):  # several, by name
        saved = {each["name"]: each["template"] for each in saved}.get("default")
    if saved:
        tokenizer.chat_template = saved
        set_thinking(tokenizer, is_thinking(tokenizer))  # the template of an older adapter does not say it itself


def load_adapter(model: PreTrainedModel, adapter_path: str, info: dict[str, Any]) -> PeftModel:
    """Attach a saved adapter to its base model, for inference.

    Raises:
        SystemExit: code 2, if the adapter was trained on another base model. Another quantisation than in training only
            gives a warning.
    """
    if info:
        difference = compare_fingerprints(info["base_fingerprint"], base_fingerprint(model))
        if difference:
            fail(
                f"'{adapter_path}' was trained on another base model ({info['base_model']}): {difference}.\n"
                "Name the base model it was trained on with --model_path"
            )
        if quantization(model) != info["quantization"]:
            names = {"nf4": "4-bit", None: "16 or 32 bits"}
            warn(
                f"the adapter was trained on a base model in {names[info['quantization']]} and now runs on "
                f"one in {names[quantization(model)]}; its answers may be a little worse"
            )
    try:
        config = PeftConfig.from_pretrained(adapter_path)
        config.inference_mode = True
        mapping = map_to_text_part(model, config, adapter_path)
        model_class = SoftPromptModel if config.peft_type == PeftType.PROMPT_TUNING else PeftModelForCausalLM
        model = model_class(model, config)
        keys = model.load_adapter(adapter_path, "default", key_mapping=mapping)
        if config.peft_type == PeftType.LORA and (keys.missing_keys or keys.unexpected_keys):
            raise ValueError(
                f"weights without a place: {sorted(keys.unexpected_keys)[:2]}, places without a weight: "
                f"{sorted(keys.missing_keys)[:2]}"
            )
    except Exception as error:  # PEFT missed a name, found one or a shape too many, or a field of another type
        if is_out_of_memory(error):
            raise
        fail(f"'{adapter_path}' does not fit this base model: {' '.join(str(error).split())[:300]}")
    return model.eval()
