"""Fine-tune Qwen with LoRA or, with 4-bit base weights, QLoRA.

    python train_lora.py --model_path path/to/qwen --data_path data/train.json --output_dir outputs/lora --fp16 True

Without arguments it trains models/tiny-qwen on data/train.json, in under a minute on a laptop.
"""

import json
import re
from dataclasses import dataclass

from finetuning.cli.console import fact  # before peft, whose import is noisy

# isort: split
from peft import LoraConfig
from transformers import PreTrainedModel

from common import load_data, load_model, load_tokenizer, start_run, train
from finetuning.cli.arguments import flag
from finetuning.cli.memory import memory_advice
from finetuning.distributed import shards_weights
from finetuning.model.lora import add_lora, find_layers, find_modules, find_numbers, find_parameters, make_optimizer
from finetuning.preprocessing.show import print_rows
from finetuning.training.flags import memory_flags, parse_arguments

# Fields of LoraConfig that need data, code or a loss of their own.
NOT_HERE = re.compile("_config$|^use_|alora|layer_replication|megatron")


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"

    lora_r: int = flag(8, "rank of the update of each adapted matrix")
    lora_alpha: int = flag(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, "share of the update's inputs that is set to 0 in training")
    target_modules: str = flag("q_proj,k_proj,v_proj", "names of the layers to adapt, commas between; or all-linear")
    target_parameters: str | None = flag(
        None, "parameters to adapt that are no layers, such as those of experts: mlp.experts.gate_up_proj"
    )
    modules_to_save: str | None = flag(None, "modules to train as a whole and save with the adapter, such as lm_head")
    layers_to_transform: str | None = flag(None, "adapt only these layers, counted from 0: 0,1,2 or 12-23")
    use_rslora: bool = flag(False, "rsLoRA: scale by lora_alpha / sqrt(lora_r), for high ranks")
    use_dora: bool = flag(False, "DoRA: train the lengths of the weights' rows apart from their directions; slower")
    init_lora_weights: str | None = flag(
        None,
        "how the update begins; left out: with 0. pissa and olora take its start out of the base weights, "
        "loftq makes up for 4 bits",
        choices=["gaussian", "orthogonal", "pissa", "olora", "loftq"],
    )
    loraplus_lr_ratio: float | None = flag(None, "LoRA+: how many times the learning rate B matrices get; 16 is usual")
    lora_kwargs: str = flag("{}", 'more fields of PEFT\'s LoraConfig, as JSON: \'{"rank_pattern": {"q_proj": 16}}\'')

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r}: nothing would be trained; the usual ranks are 4 to 64")
        if self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: the update would be scaled to nothing; 32 is usual")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: must be at least 0 and less than 1")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio < 1:
            raise ValueError(f"--loraplus_lr_ratio {self.loraplus_lr_ratio}: must be at least 1; 16 is usual")
        if others := list(filter(NOT_HERE.search, json.loads(self.lora_kwargs))):
            raise ValueError(f"--lora_kwargs: {others[0]} takes more than a flag; use PEFT itself, or leave it out")
        self.make_config(["q_proj"])  # what PEFT refuses, it refuses before the model is loaded

    def make_config(self, target_modules: list[str], **others: object) -> LoraConfig:
        """PEFT's configuration, for layers of these names."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init_lora_weights in (None, "loftq") else self.init_lora_weights,
            **others,
            **json.loads(self.lora_kwargs),
        )


def build_lora_config(lora_args: LoraArguments, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration for a model; a name that the model lacks is refused with exit code 2."""
    names = find_layers(model, lora_args.target_modules)
    fact("method", f"LoRA of rank {lora_args.lora_r} on {', '.join(names)}")
    return lora_args.make_config(
        names,
        target_parameters=find_parameters(model, lora_args.target_parameters),
        modules_to_save=find_modules(model, lora_args.modules_to_save),
        layers_to_transform=find_numbers(model, lora_args.layers_to_transform),
    )


def main() -> None:
    args = parse_arguments(LoraArguments, __doc__, output_dir="outputs/lora", learning_rate=3e-4)
    start_run(args)
    tokenizer = load_tokenizer(args.model, args.data.prompt_format)
    train_data, eval_data = load_data(args, tokenizer)
    if args.data.show_rows:
        return print_rows(train_data.dataset, args.data.show_rows, tokenizer)
    model = load_model(args.model, args.dtype, args.training.device, shards_weights(args.training))
    with memory_advice(args.training.device, memory_flags(args).values()):
        loftq_path = args.model.model_path if args.method.init_lora_weights == "loftq" else None
        model = add_lora(model, build_lora_config(args.method, model), loftq_path)
        optimizer = make_optimizer(model, args.training, args.method.loraplus_lr_ratio)
        train(model, tokenizer, train_data, eval_data, args, optimizer)


if __name__ == "__main__":
    main()
