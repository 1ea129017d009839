"""Attention without a mask: within the rows of a flattened batch, or causal on rows padded on the right."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from finetuning.training.collators import layer_types, needs_no_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

STOCK = "sdpa"  # what transformers chooses for every Qwen
KERNELS = {  # what the run prints
    "varlen": "varlen_attn, all rows at once",
    "rows": "SDPA without a mask",
    "repeated_rows": "SDPA without a mask, keys and values repeated",
    STOCK: "SDPA as transformers calls it",
}


def choose_attention(
    config: PreTrainedConfig, flattened: bool, capability: tuple[int, int] | None, half_precision: bool
) -> str:
    """Choose the one of the KERNELS that trains.

    Keys and values are repeated if only kernels that want as many key heads as query heads are fused: with fewer,
    PyTorch takes its slowest way there, in float32 and with T x T scores in memory.

    Args:
        capability: the compute capability of a CUDA device; None for other devices.
        half_precision: whether training runs in float16 or bfloat16.
    """
    if not needs_no_mask(config):  # sliding windows, or an unknown family
        return STOCK
    if capability is None:  # not CUDA
        return "rows"
    if capability < (8, 0) or not half_precision:
        return "repeated_rows"
    return "varlen" if flattened and torch_has_varlen() and not config.attention_dropout else "rows"


def torch_has_varlen() -> bool:
    """Whether this PyTorch has `varlen_attn`, and was built to run it."""
    return varlen_attn is not None and torch.backends.cuda.is_flash_attention_available()


signature = cache(inspect.signature)  # each layer asks for it


def missing_packages(config: PreTrainedConfig) -> list[str]:
    """What to install for fast linear attention (hybrid Qwens): transformers uses these packages if they are there."""
    packages = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
    return [
        name for module, name in packages.items() if "linear_attention" in layer_types(config) and not find_spec(module)
    ]


def attend_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """As `attend_rows`, on all rows of a flattened batch at once; `FlattenCollator` tells where they lie in T."""
    # With float32 embeddings, the rotation of the heads leaves query and key in float32. Autocast casts what goes
    # into SDPA, but does not know this kernel. Elsewhere all three have one dtype, and nothing is copied.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    rows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    known = signature(varlen_attn).parameters
    if "enable_gqa" not in known:  # before PyTorch 2.12
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    # PyTorch 2.10 has `is_causal` in place of a window, and no scale but that of all Qwens, 1 / sqrt(head_dim)
    options = {"is_causal": True, "window_size": (-1, 0), "scale": scaling, "enable_gqa": True}
    options = {name: option for name, option in options.items() if name in known}
    return varlen_attn(query, key, value, *rows, **options)[None], None


def attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    row_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    repeat: bool = False,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """PyTorch's causal attention, on one row of a flattened batch after the other, or on a padded batch.

    Args:
        query: (B, heads, T, head_dim); key and value: (B, key-value heads, T, head_dim).
        row_lengths: of the rows that make up T; None for a padded batch.
        repeat: repeat key and value heads until there are as many as query heads.

    Returns:
        (B, T, heads, head_dim), and None for the attention weights.
    """
    if repeat:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    row_lengths = row_lengths or [query.shape[2]]
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": scaling, "dropout_p": dropout, "enable_gqa": key.shape[1] < query.shape[1]}
    attended = [torch.nn.functional.scaled_dot_product_attention(*row, **options).transpose(1, 2) for row in rows]
    return torch.cat(attended, dim=1), None


# registered without a mask function: transformers makes no mask, and reads no value of a batch to decide on one
AttentionInterface.register("varlen", attend_varlen)
AttentionInterface.register("rows", attend_rows)
AttentionInterface.register("repeated_rows", partial(attend_rows, repeat=True))


@contextmanager
def attention(model: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Inside the context, the model attends with one of the KERNELS, and but for STOCK takes only training batches."""
    model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.set_attn_implementation(STOCK)
