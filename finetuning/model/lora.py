"""LoRA in PEFT's own forms: which parts of a model it reaches, how its matrices begin, and LoRA+'s learning rates."""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, Trainer, TrainingArguments

from finetuning.cli.console import fact, fail, first_line, say
from finetuning.distributed import engine_asked_for
from finetuning.model.fingerprint import CHANGES_BASE, quantization


def find_layers(model: PreTrainedModel, wanted: str) -> list[str]:
    """The linear layers in `--target_modules`. PEFT alone accepts a list of which one name matches."""
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    known = sorted(linear - {"lm_head"})
    return known if wanted == "all-linear" else find_names("--target_modules", wanted, known, " (or all-linear)")


def find_modules(model: PreTrainedModel, wanted: str | None) -> list[str] | None:
    """The modules in `--modules_to_save`."""
    known = {name.split(".")[-1] for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    return wanted and find_names("--modules_to_save", wanted, known)


def find_parameters(model: PreTrainedModel, wanted: str | None) -> list[str] | None:
    """The parameters in `--target_parameters`: matrices in one tensor, such as those of routed experts."""
    known = {name.split(".", 3)[-1] for name, weight in model.named_parameters() if weight.ndim == 3}
    return wanted and find_names("--target_parameters", wanted, known)


def find_names(flag: str, wanted: str, known: Iterable[str], more: str = "") -> list[str]:
    """The names in a flag, commas between; exits with code 2 if one is not at the end of any known name."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    missing = [name for name in names if not any(f".{each}".endswith(f".{name}") for each in known)]
    if missing or not names:
        has = ", ".join(sorted(known)) or "none"
        fail(f"{flag} {wanted}: the model has no '{', '.join(missing)}'.\nIt has: {has}{more}")
    return names


def find_numbers(model: PreTrainedModel, wanted: str | None) -> list[int] | None:
    """The numbers of layers in `--layers_to_transform`, such as 0,1,2 or 12-23."""
    if wanted is None:
        return None
    count, numbers = model.config.get_text_config().num_hidden_layers, []
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1) if match else [count]
    if not numbers or max(numbers) >= count:
        fail(f"--layers_to_transform {wanted}: the model has layers 0 to {count - 1}; write 0,1,2 or 12-23")
    return numbers


def add_lora(model: PreTrainedModel, config: LoraConfig, loftq_path: str | None = None) -> PeftModel:
    """Add LoRA to the base model, and print which parts of its layers are adapted.

    Args:
        loftq_path: if 4 bits shall be made up for, the checkpoint before its quantisation.
    """
    if quantization(model) and config.init_lora_weights in CHANGES_BASE:
        fail(f"--init_lora_weights {config.init_lora_weights} takes from the base weights: for 4 bits there is loftq")
    if loftq_path and (not quantization(model) or model.device.type == "cpu"):
        fail("--init_lora_weights loftq makes up for 4 bits, on a GPU: add --load_in_4bit True, or leave it out")
    names = set(config.target_modules)  # PEFT takes some of them for those of experts
    names = set() if names == set(find_layers(model, "all-linear")) else names  # as far as PEFT can
    try:
        model = get_peft_model(model, config)
        if loftq_path:
            replace_lora_weights_loftq(model, loftq_path)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:  # such as dropout on routed experts
        fail(f"LoRA cannot be added with these flags: {first_line(error)}")
    adapted = {path.split(".")[-1] for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    lost = sorted(names - adapted)
    if lost and "experts" not in adapted:
        fail(f"--target_modules: PEFT does not adapt {', '.join(lost)} of this model")
    parts = adapted_parts(model)
    fact("adapted", ", ".join(f"{part} {sum(each)} of {len(each)} layers" for part, each in parts.items()))
    if not any(parts.get("linear_attn", [True])):  # hybrid Qwens: three layers of four
        kinds = {name.split(".")[-1] for name, _ in model.named_modules() if "linear_attn." in name}
        reach = [name for name in ("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj") if name in kinds]
        say(f"to reach linear_attn, add to --target_modules: {','.join(reach)}")
    return model


def adapted_parts(model: PeftModel) -> dict[str, list[bool]]:
    """For each part of the decoder layers, such as self_attn or mlp.experts, whether it is adapted, layer by layer.

    Names of modules alone do not tell: of a mixture of experts PEFT adapts the routed experts or the shared one, by the
    family of the model.
    """
    parts: dict[str, dict[str, bool]] = defaultdict(dict)
    for path, module in model.named_modules():
        layer = re.search(r"layers\.(\d+)\.(.+?)(\.base_layer)?$", path)
        is_adapted = isinstance(module, BaseTunerLayer)
        has_weights = any(weight.ndim > 1 for weight in module.parameters(recurse=False))  # and not only a norm's
        if not layer or "lora_" in path or not (is_adapted or has_weights) or isinstance(module, torch.nn.Conv1d):
            continue
        part, number = layer[2], layer[1]
        if isinstance(module.get_base_layer() if is_adapted else module, torch.nn.Linear) and not part.endswith("gate"):
            part = part.rpartition(".")[0]  # self_attn, of self_attn.q_proj
        parts[part][number] = parts[part].get(number, False) or is_adapted
    return {part: list(layers.values()) for part, layers in parts.items()}


def make_optimizer(model: PeftModel, args: TrainingArguments, ratio: float | None) -> torch.optim.Optimizer | None:
    """LoRA+'s optimizer, with a learning rate of the B matrices that is `ratio` times that of the A matrices.

    Returns None without a ratio: then the Trainer makes its own.
    """
    if ratio is None:
        return None
    if engine := engine_asked_for(args):
        fail(f"--loraplus_lr_ratio does not work with {engine}; leave it out")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        options |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": args.weight_decay}
        return create_loraplus_optimizer(model, kind, **options)
    except Exception as error:  # of an optimizer that wants other groups of parameters
        fail(f"--loraplus_lr_ratio with --optim {args.optim.value}: {first_line(error)}")
