"""Fine-tune Qwen with LoRA or, with 4-bit base weights, QLoRA.

    python train_lora.py --model_path path/to/qwen --data_path data/train.json --output_dir outputs/lora --fp16 True

Without arguments it trains models/tiny-qwen on data/train.json, in under a minute on a laptop.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from finetuning.cli.console import fact, fail, say  # before peft, whose import is noisy

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from common import load_data, load_model, load_tokenizer, start_run, train
from finetuning.cli.arguments import flag
from finetuning.cli.memory import memory_advice
from finetuning.distributed import shards_weights
from finetuning.preprocessing.show import print_rows
from finetuning.training.flags import memory_flags, parse_arguments


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"

    lora_r: int = flag(8, "rank of the update of each adapted matrix")
    lora_alpha: int = flag(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, "share of the update's inputs that is set to 0 in training")
    target_modules: str = flag("q_proj,k_proj,v_proj", "names of the layers to adapt, commas between; or all-linear")

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r}: nothing would be trained; the usual ranks are 4 to 64")
        if self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: the update would be scaled to nothing; 32 is usual")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: must be at least 0 and less than 1")


def build_lora_config(lora_args: LoraArguments, model: PreTrainedModel) -> LoraConfig:
    """Build PEFT's configuration.

    Raises:
        SystemExit: code 2, if a name is not a layer of the model. PEFT alone accepts a list of which one name matches.
    """
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kinds = sorted(linear - {"lm_head"})
    names = [name.strip() for name in lora_args.target_modules.split(",") if name.strip()]
    if names == ["all-linear"]:
        names = kinds
    missing = [name for name in names if name not in kinds]
    if missing or not names:
        fail(
            f"--target_modules {lora_args.target_modules}: the model has no layer '{', '.join(missing)}'.\n"
            f"It has: {', '.join(kinds)} (or all-linear for all of them)"
        )
    fact("method", f"LoRA of rank {lora_args.lora_r} on {', '.join(names)}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=names,
    )


def add_lora(model: PreTrainedModel, lora_args: LoraArguments) -> PeftModel:
    """Add LoRA to the base model, and print which parts of its layers are adapted."""
    config = build_lora_config(lora_args, model)
    names = list(config.target_modules)  # PEFT takes some of them for those of experts
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # such as dropout on routed experts
        fail(f"--target_modules {lora_args.target_modules}: {error}")
    adapted = {path.split(".")[-1] for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    lost = [name for name in sorted(names) if name not in adapted and name in lora_args.target_modules]
    if lost and "experts" not in adapted:
        fail(f"--target_modules {lora_args.target_modules}: PEFT does not adapt {', '.join(lost)} of this model")
    parts = adapted_parts(model)
    fact("adapted", ", ".join(f"{part} {sum(each)} of {len(each)} layers" for part, each in parts.items()))
    if not any(parts.get("linear_attn", [True])):  # hybrid Qwens: three layers of four
        kinds = {name.split(".")[-1] for name, _ in model.named_modules() if "linear_attn." in name}
        names = [name for name in ("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj") if name in kinds]
        say(f"to reach linear_attn, add to --target_modules: {','.join(names)}")
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


def main() -> None:
    args = parse_arguments(LoraArguments, __doc__, output_dir="outputs/lora", learning_rate=3e-4)
    start_run(args)
    tokenizer = load_tokenizer(args.model, args.data.prompt_format)
    train_data, eval_data = load_data(args, tokenizer)
    if args.data.show_rows:
        return print_rows(train_data.dataset, args.data.show_rows, tokenizer)
    model = load_model(args.model, args.dtype, args.training.device, shards_weights(args.training))
    with memory_advice(args.training.device, memory_flags(args).values()):
        model = add_lora(model, args.method)
        train(model, tokenizer, train_data, eval_data, args)


if __name__ == "__main__":
    main()
