"""Count what a forward pass keeps for the backward pass, for each token and layer; needs no GPU and no weights.

    python -m benchmarking.kept_bytes --shape qwen2.5-7b

The tensors are fake: they have a shape and a dtype, but no values. The operations are those of a GPU in float16, with
`varlen_attn` for the attention.
"""

from dataclasses import dataclass
from functools import cache

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode  # as documented; the meta device has no autocast
from transformers import AutoModelForCausalLM

from benchmarking.shapes import SHAPES, make_config
from finetuning.cli.arguments import ScriptParser, flag
from finetuning.cli.console import say
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.training.attention import attention
from finetuning.training.collators import FlattenCollator
from finetuning.training.losses import put_loss_head

TOKENS = 256
KIB = 1024


@dataclass
class KeptBytesArguments:
    _argument_group_name = "kept bytes"

    shape: str = flag("qwen2.5-7b", "of a released model", choices=list(SHAPES))


class GpuDropout(torch.nn.Module):
    """Dropout as on a GPU, which keeps a byte for each number; a CPU keeps as many as the number has."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(states, 0.05, True)[0]


def make_model(shape: str, layers: int, method: str) -> PeftModel:
    """Some layers of a shape in float16, with the default adapter of the method `lora` or `prompt_tuning`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape, layers), dtype=torch.float16)
        if method == "prompt_tuning":
            model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
        else:
            names = ["q_proj", "k_proj", "v_proj"]
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names, lora_dropout=0.05))
            for name in names:
                for layer in model.get_base_model().model.layers:
                    layer.self_attn.get_submodule(name).lora_dropout["default"] = GpuDropout()
    return model.to_empty(device="cpu").train()  # memory that is never touched


def count_kept_bytes(
    shape: str, layers: int, tokens: int, method: str, checkpointing: bool = False, cast_inputs: bool = False
) -> int:
    """The bytes of everything that a forward pass on one row keeps, weights included; if asked, with PEFT's cast of the
    input of LoRA layers, which our Trainer switches off."""
    model = make_model(shape, layers, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = FlattenCollator()([{name: [1] * tokens for name in ("input_ids", "labels")}])
    head = put_loss_head(model.get_base_model())
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # views share theirs
        storages[id(storage)] = storage
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        attention(model.get_base_model(), "varlen"),
        disable_input_dtype_casting(model, active=not cast_inputs),
        torch.autocast("cpu", torch.float16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = head.loss(model, batch)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@cache
def per_token_and_layer(shape: str, method: str, checkpointing: bool = False, cast_inputs: bool = False) -> float:
    """The bytes kept for each token and layer: a second difference, in which all else cancels."""
    one, two = (
        count_kept_bytes(shape, layers, 2 * TOKENS, method, checkpointing, cast_inputs)
        - count_kept_bytes(shape, layers, TOKENS, method, checkpointing, cast_inputs)
        for layers in (1, 2)
    )
    return (two - one) / TOKENS


def main() -> None:
    (args,) = ScriptParser((KeptBytesArguments,), __doc__).parse()
    say(f"{args.shape}, float16: KiB kept for the backward pass, for each token and layer")
    for method, title in {"lora": "LoRA on q, k, v", "prompt_tuning": "prompt tuning"}.items():
        kept, checkpointed = (per_token_and_layer(args.shape, method, on) / KIB for on in (False, True))
        say(f"  {title:16} {kept:6.1f}, with checkpointing {checkpointed:5.1f}")


if __name__ == "__main__":
    main()
