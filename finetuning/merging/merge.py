"""Merging: which tensors of the base checkpoint an adapter changes, and into what."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from finetuning.cli.console import fail, say
from finetuning.merging.checkpoint_copy import (
    TOKENIZER,
    Change,
    add_tokens,
    copy_other_files,
    find_tensors,
    read_json,
    write_config,
    write_generation_config,
    write_template,
    write_weights,
)
from finetuning.merging.served_template import PLAIN_RESPONSE, SOFT_TOKEN, serve_template, soft_tokens
from finetuning.model.multimodal import PREFIX, TEXT, WEIGHTS, WHOLE, write_for_whole_class
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import pad_token_id, stop_token_ids
from finetuning.preprocessing.templates import prompt_format

# Fields of PEFT's LoRA configuration that make an adapter more than a change of the base model's own matrices.
NOT_MERGED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "trainable_token_indices")
HEAD = "lm_head.weight"
VOCABULARY_MULTIPLE = 64  # the rows of an embedding; GPUs are slow at other sizes


def check_can_merge(adapter_path: str, config: dict[str, Any], export: str) -> None:
    """Refuse an adapter that cannot be written into the base model's tensors, or exported as an adapter."""
    found = [name for name in NOT_MERGED if config.get(name)]
    if found and export == "checkpoint":
        fail(f"'{adapter_path}' has {', '.join(found)}, which cannot be merged; ask it with inference.py")
    if export == "peft" and config["peft_type"] != "LORA":
        fail("--export peft: no engine loads soft prompts as adapters; leave it out to make a checkpoint of this one")


def export_adapter(adapter_path: str, folder: Path, output: Path) -> None:
    """Write a LoRA adapter under the names of the class that the base checkpoint is of."""
    architecture = read_json(folder / "config.json")["architectures"][0]
    if architecture.endswith("ForConditionalGeneration"):
        write_for_whole_class(adapter_path, str(output))
    else:
        shutil.copytree(adapter_path, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))


def write_merged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter_path: str,
    folder: Path,
    output: Path,
    plain_start: str = "",
    dtype: torch.dtype | None = None,
    sampling: bool = False,
) -> list[int]:
    """Write base and adapter as one checkpoint, which any program can serve as it was trained.

    Args:
        model: base and adapter; merged afterwards.
        tokenizer: that of the base, with the trained chat template.
        folder: the base checkpoint.
        output: an empty folder.
        plain_start: what a prompt in the plain format ends with, from `choose_plain_start`.
        dtype: of the weights; None leaves each as it is.
        sampling: whether answers are sampled as the base model's are, or greedy.

    Returns:
        The ids of a soft prompt's tokens, with which every conversation begins.
    """
    tensors = set(find_tensors(folder))
    soft_ids, rows = [], None
    if isinstance(model, SoftPromptModel):
        check_tokenizer(tokenizer, folder)
        used, count = max(tokenizer.get_vocab().values()) + 1, len(model.prompt)
        before = len(model.get_input_embeddings().weight)
        rows = before if used + count <= before else -(-(used + count) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        soft_ids = list(range(used, used + count))
        changes = soft_prompt_changes(model.prompt.detach(), used, rows, is_tied(model), tensors)
        grown = f"; the vocabulary grows from {before:,} to {rows:,} rows" if rows > before else ""
        say(f"soft prompt: {count} special tokens, ids {used} to {used + count - 1}{grown}")
    else:
        changes = lora_changes(model, adapter_path, tensors)
        say(f"LoRA: {len(changes)} of {len(tensors)} tensors change")
    untied = is_tied(model) and embedding_name(tensors) in changes
    copy_other_files(folder, output)
    write_weights(folder, output, changes, dtype)
    write_config(output, untied, rows, dtype)
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


def is_tied(model: PeftModel) -> bool:
    """Whether the output layer of the base model shares the weights of its embedding."""
    return model.get_base_model().config.get_text_config().tie_word_embeddings


def on_disk(name: str, tensors: set[str]) -> str:
    """The name in the checkpoint of a tensor of the text part."""
    return name if name in tensors else name.replace(TEXT, WHOLE, 1)


def embedding_name(tensors: set[str]) -> str:
    return on_disk("model.embed_tokens.weight", tensors)


def lora_changes(model: PeftModel, adapter_path: str, tensors: set[str]) -> dict[str, Change]:
    """What a LoRA adapter changes: the matrices that it has a product for, and tensors that it holds as a whole.

    The arithmetic is PEFT's, in float32: DoRA, rsLoRA and the others come out as they are computed there.

    Args:
        model: the base with the adapter. Its adapted layers are merged as they are written.
        tensors: the names in the checkpoint; an adapter that changes another one is refused.
    """
    base = model.get_base_model()
    inside = TEXT if not any(WHOLE in name for name, _ in base.named_modules()) else WHOLE
    changes: dict[str, Change] = {}
    with safe_open(Path(adapter_path, WEIGHTS), "pt") as file:
        for key in file.keys():
            module, is_product, _ = key.removeprefix(PREFIX).replace(WHOLE, inside, 1).partition(".lora_")
            name = module.replace(".base_layer", "")
            if not is_product:  # modules_to_save, and biases that were trained
                new = file.get_tensor(key)
                changes[on_disk(name, tensors)] = lambda _, new=new: new
                continue
            layer = base.get_submodule(module)
            if isinstance(layer, ParamWrapper):
                changes |= expert_changes(base, layer, f"{name}.{layer.parameter_name}", tensors)
                continue
            for parameter in ("weight", "bias") if key.endswith(".bias") else ("weight",):
                changes[on_disk(f"{name}.{parameter}", tensors)] = partial(merged, layer, parameter)
    embedding = embedding_name(tensors)
    if is_tied(model) and {HEAD, embedding} & changes.keys():
        first, second = (changes.pop(name, lambda old: old) for name in (embedding, HEAD))
        changes[embedding] = lambda old: {embedding: first(old), HEAD: second(old).clone()}
        if HEAD in tensors:  # of no use while they were tied
            changes[HEAD] = lambda _: {}
    missing = sorted(changes.keys() - tensors)
    if missing:
        fail(f"'{adapter_path}' changes {missing[0]}, which the checkpoint does not have; it cannot be merged")
    return changes


def merged(layer: LoraLayer, parameter: str, _: torch.Tensor | None = None) -> torch.Tensor:
    """A parameter of an adapted layer with the adapter merged into it, float32 the first time it is asked for."""
    base = layer.get_base_layer()
    dtype = base.get_parameter(parameter).dtype
    if not layer.merged:
        base.float()
        layer.merge()
    result = base.get_parameter(parameter).detach()
    base.to(dtype)  # the other layers need the memory
    return result


def expert_changes(base: PreTrainedModel, layer: ParamWrapper, name: str, tensors: set[str]) -> dict[str, Change]:
    """What changes if a parameter (`name`) is adapted that holds all experts; most checkpoints hold them one by one."""
    if on_disk(name, tensors) in tensors:
        return {on_disk(name, tensors): partial(merged, layer, layer.parameter_name)}
    pieces: dict[str, torch.Tensor] = {}

    def merge_expert(piece: str, _: torch.Tensor) -> torch.Tensor:
        if not pieces:
            pieces.update(revert_weight_conversion(base, {name: merged(layer, layer.parameter_name)}))
        return pieces.pop(piece)

    shape = layer.get_base_layer().get_parameter(layer.parameter_name).to("meta")
    return {piece: partial(merge_expert, piece) for piece in revert_weight_conversion(base, {name: shape})}


def soft_prompt_changes(prompt: torch.Tensor, used: int, rows: int, tied: bool, tensors: set[str]) -> dict[str, Change]:
    """What a soft prompt changes: its vectors become the embeddings of the ids that follow those in use.

    The output layer needs rows for these ids too, and with tied weights they would be the vectors themselves, which are
    longer than embeddings and would be answered. So it gets weights of its own, and rows that are never answered.

    Args:
        prompt: (num_virtual_tokens, hidden_size).
        used: ids that the tokenizer knows.
        rows: of the embedding afterwards.
        tensors: the names in the checkpoint.
    """
    embedding = embedding_name(tensors)

    def embed(old: torch.Tensor) -> dict[str, torch.Tensor]:
        new = pad(old, (0, 0, 0, rows - len(old)))
        new[used : used + len(prompt)] = prompt.to(new.dtype)
        return {embedding: new} | ({HEAD: answer(old)} if tied else {})

    def answer(old: torch.Tensor) -> torch.Tensor:
        new = pad(old, (0, 0, 0, rows - len(old)))
        new[used : used + len(prompt)] = new[len(old) :] = never_answered(old, used).to(new.dtype)
        return new

    return {embedding: embed} | ({HEAD: (lambda _: {}) if tied else answer} if HEAD in tensors else {})


def never_answered(head: torch.Tensor, used: int) -> torch.Tensor:
    """A row for the output layer whose token is never the most probable one, whatever the hidden state.

    It is a mean of other rows, so its logit is the mean of theirs, which never exceeds the largest. Those of ids
    without a token are best: pretraining has made them improbable. A vocabulary without such ids gives the mean of all.

    Args:
        head: (rows, hidden_size), the output layer.
        used: ids that the tokenizer knows.
    """
    spare = head[used:] if used < len(head) else head
    return spare.float().mean(dim=0)
