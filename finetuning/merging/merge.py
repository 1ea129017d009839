"""Merging: which tensors of the base checkpoint an adapter changes, and into what."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from finetuning.cli.console import fail, say
from finetuning.merging.checkpoint_copy import (
    HEAD,
    TOKENIZER,
    Change,
    Checkpoint,
    add_tokens,
    copy_other_files,
    write_config,
    write_generation_config,
    write_template,
    write_weights,
)
from finetuning.merging.serving import PLAIN_RESPONSE, SOFT_TOKEN, serve_template, soft_tokens
from finetuning.model.base_model import has_tokenizer
from finetuning.model.fingerprint import CHANGES_BASE
from finetuning.model.folder import NO_EFFECT, changes_nothing
from finetuning.model.multimodal import (
    MULTIMODAL_PREFIX,
    PREFIX,
    TEXT_PREFIX,
    WEIGHTS,
    is_multimodal,
    write_for_multimodal,
)
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import pad_token_id, stop_token_ids
from finetuning.preprocessing.templates import prompt_format

# Fields of PEFT's LoRA configuration that make an adapter more than a change of the base model's own matrices.
NOT_MERGED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "trainable_token_indices")
VOCABULARY_MULTIPLE = 64  # the rows of an embedding; GPUs are slow at other sizes


def check_can_merge(adapter_path: str, config: dict[str, Any], export: str) -> None:
    """Refuse an adapter that cannot be written into the base model's tensors, or exported as an adapter."""
    if changes_nothing(load_file(Path(adapter_path, WEIGHTS))):
        fail(f"'{adapter_path}' {NO_EFFECT}")
    found = [name for name in NOT_MERGED if config.get(name)]
    if found and export == "checkpoint":
        fail(f"'{adapter_path}' has {', '.join(found)}, which cannot be merged; ask it with inference.py")
    if export == "peft" and config["peft_type"] != "LORA":
        fail("--export peft: no engine loads soft prompts as adapters; leave it out to make a checkpoint of this one")
    if export == "peft" and config.get("init_lora_weights") in CHANGES_BASE:
        start = f"began with {config['init_lora_weights']}, which changes the base model, and engines do not know that"
        fail(f"--export peft: '{adapter_path}' {start}; leave it out to make a checkpoint")


def export_adapter(adapter_path: str, base: Checkpoint, output: Path) -> None:
    """Write a LoRA adapter under the names of the class that the base checkpoint is of."""
    shutil.copytree(adapter_path, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
    if is_multimodal(base.config.get("architectures")):
        write_for_multimodal(adapter_path, str(output))


def write_merged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter_path: str,
    base: Checkpoint,
    output: Path,
    plain_start: str = "",
    dtype: torch.dtype | None = None,
    sampling: bool = False,
) -> list[int]:
    """Write base and adapter as one checkpoint, which any program can serve as it was trained.

    Args:
        model: base and adapter; merged afterwards.
        tokenizer: that of the base or of the adapter, with the trained chat template.
        plain_start: what a prompt in the plain format ends with, from `choose_plain_start`.
        dtype: of the weights; None leaves each as it is.
        sampling: whether answers are sampled as the base model's are, or greedy.

    Returns:
        The ids of a soft prompt's tokens, with which every conversation begins.
    """
    soft_ids, rows = [], base.vocab_size
    if isinstance(model, SoftPromptModel):
        check_tokenizer(tokenizer, base.folder)
        used, count = max(tokenizer.get_vocab().values()) + 1, len(model.prompt)
        if used + count > rows:
            rows = -(-(used + count) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        soft_ids = list(range(used, used + count))
        changes = soft_prompt_changes(model.prompt.detach(), used, rows, base.embedding)
        grown = f"; the vocabulary grows from {base.vocab_size:,} to {rows:,} rows" if rows > base.vocab_size else ""
        say(f"soft prompt: {count} special tokens, ids {used} to {used + count - 1}{grown}")
    else:
        changes = lora_changes(model, adapter_path, base)
        say(f"LoRA: {len(changes)} of {len(base.files)} tensors change")
    tied = model.get_base_model().config.get_text_config().tie_word_embeddings
    untied = tied and bool({base.embedding, HEAD} & changes.keys())
    copy_other_files(base, output)
    if has_tokenizer(Path(adapter_path)):
        tokenizer.save_pretrained(output)
    write_weights(base, output, changes, untied, dtype)
    write_config(base, output, untied, rows, dtype, type(model.get_base_model()).__name__)
    write_generation_config(output, stop_token_ids(tokenizer), pad_token_id(tokenizer), sampling)
    names = soft_tokens(len(soft_ids))
    if names:
        add_tokens(output, dict(zip(names, soft_ids, strict=True)))
    response = PLAIN_RESPONSE if prompt_format(tokenizer) == "plain" else None
    write_template(output, serve_template(tokenizer.chat_template, names, plain_start), response)
    return soft_ids


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer that cannot get the tokens of a soft prompt."""
    if not (folder / TOKENIZER).is_file():
        fail(f"'{folder}' has no {TOKENIZER}; write it with AutoTokenizer.from_pretrained and save_pretrained")
    if any(token.startswith(SOFT_TOKEN) for token in tokenizer.get_vocab()):
        fail(f"'{folder}' already holds a soft prompt; only LoRA can be merged into it")


def lora_changes(model: PeftModel, adapter_path: str, base: Checkpoint) -> dict[str, Change]:
    """What a LoRA adapter changes: the matrices that it has a product for, and tensors that it holds as a whole.

    The arithmetic is PEFT's, in float32: DoRA, rsLoRA and the others come out as they are computed there. The layers of
    `model` are merged one by one, when they are written.
    """
    base_model, changes = model.get_base_model(), {}
    with safe_open(Path(adapter_path, WEIGHTS), "pt") as file:
        for key in file.keys():
            if ".lora_" not in key:  # modules_to_save, and biases that were trained
                # an adapter of a multimodal class is loaded into the text part
                name = key.removeprefix(PREFIX).replace(MULTIMODAL_PREFIX, TEXT_PREFIX, 1).replace(".base_layer", "")
                new = file.get_tensor(key)
                changes[base.name_of(name)] = lambda _, new=new: new
    # the layers, and not the keys: PEFT makes one adapter of all experts where transformers 4 had one of each
    for module, layer in base_model.named_modules():
        name = module.replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            changes |= expert_changes(base_model, layer, f"{name}.{layer.parameter_name}", base)
        elif isinstance(layer, LoraLayer):
            for parameter in ("weight", "bias") if any(layer.lora_bias.values()) else ("weight",):
                changes[base.name_of(f"{name}.{parameter}")] = partial(merged, layer, parameter)
    missing = sorted(changes.keys() - base.files.keys() - {HEAD})  # a tied output layer is not on disk
    if missing:
        fail(f"'{adapter_path}' changes {missing[0]}, which the checkpoint does not have; it cannot be merged")
    return changes


def merged(layer: LoraLayer, parameter: str, _: torch.Tensor | None = None) -> torch.Tensor:
    """A parameter of an adapted layer with the adapter merged into it, float32 the first time it is asked for."""
    base_layer = layer.get_base_layer()
    dtype = base_layer.get_parameter(parameter).dtype
    if not layer.merged:
        base_layer.float()
        layer.merge()
    result = base_layer.get_parameter(parameter).detach()
    base_layer.to(dtype)  # the other layers need the memory
    return result


def expert_changes(model: PreTrainedModel, layer: ParamWrapper, name: str, base: Checkpoint) -> dict[str, Change]:
    """What changes if a parameter (`name`) is adapted that holds all experts; most checkpoints hold them one by one."""
    if base.name_of(name) in base.files:
        return {base.name_of(name): partial(merged, layer, layer.parameter_name)}
    pieces: dict[str, torch.Tensor] = {}

    def merge_expert(piece: str, _: torch.Tensor) -> torch.Tensor:
        if not pieces:
            pieces.update(revert_weight_conversion(model, {name: merged(layer, layer.parameter_name)}))
        return pieces.pop(piece)

    shape = layer.get_base_layer().get_parameter(layer.parameter_name).to("meta")
    names = revert_weight_conversion(model, {name: shape})
    return {base.name_of(piece): partial(merge_expert, piece) for piece in names}


def soft_prompt_changes(prompt: torch.Tensor, used: int, rows: int, embedding: str) -> dict[str, Change]:
    """What a soft prompt changes: its vectors become the embeddings of the ids that follow those in use.

    The output layer needs rows for these ids too, and with tied weights they would be the vectors themselves, which are
    longer than embeddings and would be answered. So it gets weights of its own, and rows that are never answered.

    Args:
        prompt: (num_virtual_tokens, hidden_size).
        used: number of ids that the tokenizer knows.
        rows: of the embedding afterwards.
    """
    new_ids = slice(used, used + len(prompt))

    def embed(old: torch.Tensor) -> torch.Tensor:
        new = pad(old, (0, 0, 0, rows - len(old)))
        new[new_ids] = prompt.to(new.dtype)
        return new

    def answer(old: torch.Tensor) -> torch.Tensor:
        new = pad(old, (0, 0, 0, rows - len(old)))
        # The logit of a mean of rows is the mean of their logits, which never exceeds the largest, whatever the hidden
        # state. Rows of ids without a token are best, because pretraining has made them improbable.
        new[new_ids] = new[len(old) :] = old[used if used < len(old) else 0 :].float().mean(dim=0).to(new.dtype)
        return new

    return {embedding: embed, HEAD: answer}
