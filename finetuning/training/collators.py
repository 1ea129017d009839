"""Batches without waste: no padding if the model allows it, and logits only for supervised tokens.

Instruction rows are short and Qwen's vocabulary is large, so the padding between rows and the logits of prompt tokens
(152k numbers for each token) are most of a stock batch. Both collators also work with the stock `Trainer`, which passes
every key of the batch to the model's forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, PreTrainedConfig

from finetuning.distributed import BLANK_ROW
from finetuning.model.soft_prompts import VIRTUAL_TOKEN
from finetuning.preprocessing.encode import IGNORE_INDEX

# Families in which every layer is full attention, so that nothing passes from row to row unless the mask allows it.
# The hybrid families (qwen3_next, qwen3_5, ...) carry a recurrent state from one row into the next: they are padded.
FULL_ATTENTION_FAMILIES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
HYBRID_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def can_flatten(config: PreTrainedConfig) -> bool:
    """Whether rows may be laid end to end in one sequence: the model has full attention in every layer."""
    return config.model_type in FULL_ATTENTION_FAMILIES and layer_types(config) == {"full_attention"}


def needs_no_mask(config: PreTrainedConfig) -> bool:
    """Whether plain causal attention is right for the batches of both collators: there are no sliding windows."""
    return is_known(config) and layer_types(config) <= {"full_attention", "linear_attention"}


def is_known(config: PreTrainedConfig) -> bool:
    """Whether the model is of a family that was tried here."""
    return config.model_type in FULL_ATTENTION_FAMILIES + HYBRID_FAMILIES


def layer_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of attention in a model's layers. One that lists none has its window, if it has one, in all of them."""
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return set(getattr(config, "layer_types", None) or [window])


def row_lengths(dataset: Dataset) -> list[int]:
    """The lengths of the examples, in tokens."""
    return dataset.with_format("numpy")["length"][:].tolist()


@dataclass
class FlattenCollator:
    """Joins the rows of a batch into one sequence, without padding.

    `position_ids` start again at 0 for each row. transformers reads the row boundaries from them and keeps attention
    inside each row, but only if no key-value cache is built.

    Args:
        num_virtual_tokens: VIRTUAL_TOKEN ids to put in front of each row.

    Returns, for T tokens: `input_ids` and `position_ids` (1, T), what `supervised_only` adds, and for attention.py,
    made once and not in each layer: the B `row_lengths`, the longest (`max_length_q`), and where rows begin and end, in
    int32 (`cu_seq_lens_q`, B + 1).
    """

    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = add_virtual_tokens(rows, self.num_virtual_tokens)
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
        batch["row_lengths"] = [len(row["input_ids"]) for row in rows]
        return supervised_only(batch, rows)


@dataclass
class PadCollator:
    """Pads the rows of a batch on the right to the longest, for models that cannot take flattened rows.

    There is no `attention_mask`: attention and recurrent states are causal, so nothing passes from the padding, which
    comes last, to the row before it. A mask would rule out the fastest kernels, and transformers reads it, which waits
    for the GPU.

    Returns, for B rows of at most L tokens: `input_ids` and `position_ids` (B, L), and what `supervised_only` adds.
    """

    pad_token_id: int
    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = add_virtual_tokens(rows, self.num_virtual_tokens)
        batch = {}
        for name, value in {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}.items():
            batch[name] = pad_sequence([torch.tensor(row[name]) for row in rows], True, value)
        length = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.arange(length).expand(len(rows), -1).contiguous()
        return supervised_only(batch, rows)


def add_virtual_tokens(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows, or one without supervised tokens if there are none, with `count` virtual tokens in front of each."""
    virtual = {"input_ids": [VIRTUAL_TOKEN] * count, "labels": [IGNORE_INDEX] * count}
    return [row | {name: tokens + row[name] for name, tokens in virtual.items()} for row in rows or [BLANK_ROW]]


def supervised_only(batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Restrict logits and labels to the positions that predict a supervised token in some row of the batch.

    Args:
        batch: its `labels` (B, L) are aligned with `input_ids` (not shifted), IGNORE_INDEX for what is not supervised.

    Returns the batch with:
        `logits_to_keep`: (K,) positions of the sequence whose logits are computed.
        `labels`, `shift_labels`: (B, K) the token that follows each of those positions. transformers' loss reads
        `shift_labels`, but only computes a loss if there are `labels`.
        `use_cache`: False.
        `row_numbers`: of the rows in their data file, for NotFiniteGuard, if the dataset has them.
    """
    next_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (next_labels != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    shift_labels = next_labels[:, positions]
    numbers = {"row_numbers": [row["row_number"] for row in rows]} if "row_number" in rows[0] else {}
    restricted = {"logits_to_keep": positions, "labels": shift_labels, "shift_labels": shift_labels}
    return batch | restricted | numbers | {"use_cache": False}
