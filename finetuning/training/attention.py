"""Attention of flattened batches, row by row: no mask of length squared, and no work on pairs of different rows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

STOCK_ATTENTION = "sdpa"  # what transformers chooses for every Qwen
ROW_ATTENTION = "rows"


def row_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    row_lengths: list[int],
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """PyTorch's causal attention, on one row of a flattened batch after the other.

    Args:
        query: (1, heads, T, head_dim); key and value: (1, key-value heads, T, head_dim).
        row_lengths: of the rows that make up T; from `FlattenCollator`.

    Returns:
        (1, T, heads, head_dim), and None for the attention weights.
    """
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None


AttentionInterface.register(ROW_ATTENTION, row_attention_forward)  # without a mask function: no mask is made


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, the model takes only batches of `FlattenCollator`, without a mask."""
    model.set_attn_implementation(ROW_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(STOCK_ATTENTION)
