"""Fine-tune Qwen with LoRA or, with 4-bit base weights, QLoRA.

    python train_lora.py --model_path path/to/qwen --data_path data/train.json --output_dir outputs/lora --fp16 True

Without arguments it trains models/tiny-qwen on data/train.json, in under a minute on a laptop.
"""

from dataclasses import dataclass

from finetuning.cli.console import fact, fail, say  # before peft, whose import is noisy

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from common import load_data, load_model, load_tokenizer, start_run, train, training_dtype
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
    """Build PEFT's configuration, and print how many layers it reaches.

    Raises:
        SystemExit: code 2, if a name is not a layer of the model. PEFT alone accepts a list of which one name matches.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear.discard("lm_head")
    kinds = sorted({name.split(".")[-1] for name in linear})
    names = [name.strip() for name in lora_args.target_modules.split(",") if name.strip()]
    if names == ["all-linear"]:
        names = kinds
    missing = [name for name in names if name not in kinds]
    if missing or not names:
        fail(
            f"--target_modules {lora_args.target_modules}: the model has no layer '{', '.join(missing)}'.\n"
            f"It has: {', '.join(kinds)} (or all-linear for all of them)"
        )
    paths = [name for name in linear if name.split(".")[-1] in names and "layers." in name]
    reached = {path.split("layers.")[1].split(".")[0] for path in paths}
    layers = model.config.get_text_config().num_hidden_layers
    fact("method", f"LoRA of rank {lora_args.lora_r} on {', '.join(names)}: {len(reached)} of {layers} layers")
    if len(reached) < layers:  # hybrid Qwens: three layers of four are linear attention
        others = [name for name in ("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj") if name in kinds]
        say(f"to reach the others, add to --target_modules: {','.join(others) or 'more names'}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=names,
    )


def main() -> None:
    args = parse_arguments(LoraArguments, __doc__, output_dir="outputs/lora", learning_rate=3e-4)
    start_run(args)
    tokenizer = load_tokenizer(args.model, args.data.prompt_format)
    train_data, eval_data = load_data(args, tokenizer)
    if args.data.show_rows:
        return print_rows(train_data.dataset, args.data.show_rows, tokenizer)
    model = load_model(args.model, training_dtype(args.training), args.training.device, shards_weights(args.training))
    with memory_advice(args.training.device, memory_flags(args).values()):
        model = get_peft_model(model, build_lora_config(args.method, model))
        train(model, tokenizer, train_data, eval_data, args)


if __name__ == "__main__":
    main()
