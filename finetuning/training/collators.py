"""Batches without waste: no padding if the model allows it, and logits only for supervised tokens.

Instruction rows are short and Qwen's vocabulary is large, so the padding between rows and the logits of prompt tokens
(152k numbers for each token) are most of a stock batch. Both collators also work with the stock `Trainer`, which passes
every key of the batch to the model's forward.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from finetuning.distributed import BLANK_ROW
from finetuning.model.soft_prompts import VIRTUAL_TOKEN
from finetuning.preprocessing.encode import IGNORE_INDEX

# Families in which every layer is full attention, so that nothing passes from row to row unless the mask allows it.
# The hybrid families (qwen3_next, qwen3_5, ...) carry a recurrent state from one row into the next: they are padded.
FULL_ATTENTION_FAMILIES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
HYBRID_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Nothing to learn: for the last batch of an epoch, if there are fewer rows than processes.


def can_flatten(config: PreTrainedConfig) -> bool:
    """Whether rows may be laid end to end in one sequence: the model has full attention in every layer."""
    return config.model_type in FULL_ATTENTION_FAMILIES and layer_types(config) == {"full_attention"}


def needs_no_mask(config: PreTrainedConfig) -> bool:
    """Whether plain causal attention is right for the batches of both collators: there are no sliding windows."""
    known = config.model_type in FULL_ATTENTION_FAMILIES + HYBRID_FAMILIES
    return known and layer_types(config) <= {"full_attention", "linear_attention"}


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
    inside each row, but only if no key-value cache is built, hence `use_cache`.

    Args:
        num_virtual_tokens: VIRTUAL_TOKEN ids to put in front of each row.

    Returns, for T tokens: `input_ids` and `position_ids` (1, T), `row_numbers` (for NotFiniteGuard), what
    `supervised_only` adds, and for attention.py, made once and not in each layer: the B `row_lengths`, `longest_row`,
    and `cu_seq_lens` (B + 1), where rows begin and end, in int32.
    """

    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | bool]:
        rows = [add_virtual_tokens(row, self.num_virtual_tokens) for row in rows or [BLANK_ROW]]
        input_ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
        position_ids = torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]])
        # The last token of the row before would predict a row's first label: it is not supervised.
        labels = torch.tensor([[label for row in rows for label in [IGNORE_INDEX, *row["labels"][1:]]]])
        row_lengths = [len(row["input_ids"]) for row in rows]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "row_lengths": row_lengths,
            "cu_seq_lens": torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32),
            "longest_row": max(row_lengths),
            "use_cache": False,
            **name_rows(rows),
            **supervised_only(labels),
        }


@dataclass
class PadCollator:
    """Pads the rows of a batch on the right to the longest, for models that cannot take flattened rows.

    There is no `attention_mask`: attention and recurrent states are causal, so nothing passes from the padding, which
    comes last, to the row before it. A mask would rule out the fastest kernels, and transformers reads it, which waits
    for the GPU.

    Returns, for B rows of at most L tokens: `input_ids` and `position_ids` (B, L), `row_numbers`, and what
    `supervised_only` adds.
    """

    pad_token_id: int
    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | bool]:
        rows = [add_virtual_tokens(row, self.num_virtual_tokens) for row in rows or [BLANK_ROW]]
        length = max(len(row["input_ids"]) for row in rows)

        def pad(field: str, value: int) -> torch.Tensor:
            return torch.tensor([list(row[field]) + [value] * (length - len(row[field])) for row in rows])

        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "position_ids": torch.arange(length).expand(len(rows), -1).contiguous(),
            "use_cache": False,
            **name_rows(rows),
            **supervised_only(pad("labels", IGNORE_INDEX)),
        }


def name_rows(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The rows' numbers in their data file; nothing if the dataset does not have them."""
    return {"row_numbers": [row["row_number"] for row in rows]} if "row_number" in rows[0] else {}


def add_virtual_tokens(row: dict[str, list[int]], count: int) -> dict[str, list[int]]:
    return row | {
        "input_ids": [VIRTUAL_TOKEN] * count + row["input_ids"],
        "labels": [IGNORE_INDEX] * count + row["labels"],
    }


def supervised_only(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Restrict logits and labels to the positions that predict a supervised token in some row of the batch.

    Args:
        labels: (B, L), aligned with `input_ids` (not shifted), IGNORE_INDEX for tokens that are not supervised.

    Returns:
        `logits_to_keep`: (K,) positions of the sequence whose logits are computed.
        `labels`, `shift_labels`: (B, K) the token that follows each of those positions. transformers' loss reads
        `shift_labels`, but only computes a loss if there are `labels`.
    """
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (next_labels != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    shift_labels = next_labels[:, positions]
    return {"logits_to_keep": positions, "labels": shift_labels, "shift_labels": shift_labels}
