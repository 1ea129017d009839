"""Batches without waste: no padding where the model allows it, and logits only where a token is supervised.

Instruction rows are short and Qwen's vocabulary is large, so the padding between rows and the logits of prompt tokens
(152k numbers a token) are most of a stock batch. Both collators work with the stock `Trainer`, whose `compute_loss`
hands every key of the batch to the model's forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

IGNORE_INDEX = -100  # labels that torch's cross-entropy leaves out
VIRTUAL_TOKEN = -1  # input ids that stand for the vectors of a soft prompt (see soft_prompts.py)

# Families in which every layer is full attention, so that nothing flows between rows but what the mask lets through.
# The hybrid families (qwen3_next, qwen3_5, ...) carry a recurrent state from one row into the next: they are padded.
FULL_ATTENTION_FAMILIES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def can_flatten(config: PreTrainedConfig) -> bool:
    """Whether rows may be laid end to end in one sequence: the model has full attention in every layer."""
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    return config.model_type in FULL_ATTENTION_FAMILIES and set(layer_types) == {"full_attention"}


@dataclass
class FlattenCollator:
    """Lay the rows of a batch end to end in one sequence, without padding.

    `position_ids` start again at 0 for each row. transformers reads the row boundaries from them and keeps attention
    inside each row, but only where no key-value cache is built, hence `use_cache`.

    Args:
        num_virtual_tokens: VIRTUAL_TOKEN ids to put in front of each row.

    Returns, with T tokens in all and K supervised ones: `input_ids` and `position_ids` (1, T), `row_lengths` (for
    attention.py), and what `supervised_only` adds.
    """

    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | bool]:
        rows = [add_virtual_tokens(row, self.num_virtual_tokens) for row in rows]
        input_ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
        position_ids = torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]])
        # A row's first label would be predicted by the last token of the row before: it is not supervised.
        labels = torch.tensor([[label for row in rows for label in [IGNORE_INDEX, *row["labels"][1:]]]])
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "row_lengths": [len(row["input_ids"]) for row in rows],
            "use_cache": False,
            **name_rows(rows),
            **supervised_only(labels),
        }


@dataclass
class PadCollator:
    """Pad the rows of a batch on the right to the longest, for models that can not take flattened rows.

    Returns, with B rows of at most L tokens: `input_ids` and `attention_mask` (B, L), and what `supervised_only` adds.
    """

    pad_token_id: int
    num_virtual_tokens: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | bool]:
        rows = [add_virtual_tokens(row, self.num_virtual_tokens) for row in rows]
        length = max(len(row["input_ids"]) for row in rows)

        def pad(field: str, value: int) -> torch.Tensor:
            return torch.tensor([list(row[field]) + [value] * (length - len(row[field])) for row in rows])

        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": pad("attention_mask", 0),
            "use_cache": False,
            **name_rows(rows),
            **supervised_only(pad("labels", IGNORE_INDEX)),
        }


def name_rows(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The rows' numbers in their file, for the messages of guards.py, where they have one."""
    return {"row_numbers": [row["row_number"] for row in rows]} if "row_number" in rows[0] else {}


def add_virtual_tokens(row: dict[str, list[int]], count: int) -> dict[str, list[int]]:
    return row | {
        "input_ids": [VIRTUAL_TOKEN] * count + row["input_ids"],
        "attention_mask": [1] * count + row["attention_mask"],
        "labels": [IGNORE_INDEX] * count + row["labels"],
    }


def supervised_only(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Restrict logits and labels to the positions that predict a supervised token in some row of the batch.

    Args:
        labels: (B, L), aligned with `input_ids` (not shifted), IGNORE_INDEX where a token is not supervised.

    Returns:
        `logits_to_keep`: (K,) positions of the sequence whose logits are computed.
        `labels`, `shift_labels`: (B, K) the token that follows each of those positions. The loss reads
        `shift_labels`; `labels` only has to be there for the model to compute a loss at all.
    """
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (next_labels != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    shift_labels = next_labels[:, positions]
    return {"logits_to_keep": positions, "labels": shift_labels, "shift_labels": shift_labels}
