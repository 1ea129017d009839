"""Attention without a mask: within the rows of a flattened batch, or causal on rows padded on the right."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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
    config: PreTrainedConfig,
    flattened: bool,
    capability: tuple[int, int] | None,
    half_precision: bool,
    has_varlen: bool,
) -> str:
    """Which of the KERNELS trains: the first line that fits.

    | model                        | device           | precision | batches   | PyTorch         | kernel        |
    |------------------------------|------------------|-----------|-----------|-----------------|---------------|
    | sliding windows, or unknown  | any              | any       | any       | any             | STOCK         |
    | other                        | not CUDA         | any       | any       | any             | rows          |
    | other                        | CUDA, before 8.0 | any       | any       | any             | repeated_rows |
    | other                        | CUDA             | float32   | any       | any             | repeated_rows |
    | without dropout in attention | CUDA             | half      | flattened | has varlen_attn | varlen        |
    | other                        | CUDA             | half      | any       | any             | rows          |

    Keys and values are repeated where only kernels that want as many key heads as query heads are fused: with fewer,
    PyTorch takes its slowest way there, in float32 and with T x T scores in memory.

    Args:
        capability: the compute capability of a CUDA device; None for other devices.
        half_precision: whether training runs in float16 or bfloat16.
        has_varlen: from `torch_has_varlen`.
    """
    if not needs_no_mask(config):
        return STOCK
    if capability is None:
        return "rows"
    if capability < (8, 0) or not half_precision:
        return "repeated_rows"
    return "varlen" if flattened and has_varlen and not config.attention_dropout else "rows"


def torch_has_varlen() -> bool:
    """Whether this PyTorch has `varlen_attn`, with heads that share keys (2.10's cannot), and was built to run it."""
    if varlen_attn is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


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
    cu_seq_lens: torch.Tensor,
    longest_row: int,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention on all rows of a flattened batch at once.

    Args:
        query: (1, heads, T, head_dim); key and value: (1, key-value heads, T, head_dim).
        cu_seq_lens, longest_row: where the rows lie in T; from `FlattenCollator`.

    Returns:
        (1, T, heads, head_dim), and None for the attention weights.
    """
    # With float32 embeddings, the rotation of the heads leaves query and key in float32. Autocast casts what goes
    # into SDPA, but does not know this kernel. Elsewhere all three have one dtype, and nothing is copied.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    rows = (cu_seq_lens, cu_seq_lens, longest_row, longest_row)
    return varlen_attn(query, key, value, *rows, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None


def attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    row_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """PyTorch's causal attention, on one row of a flattened batch after the other, or on a padded batch.

    Args:
        query: (B, heads, T, head_dim); key and value: (B, key-value heads, T, head_dim).
        row_lengths: of the rows that make up T; None for a padded batch.

    Returns:
        (B, T, heads, head_dim), and None for the attention weights.
    """
    row_lengths = row_lengths or [query.shape[2]]
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": scaling, "dropout_p": dropout, "enable_gqa": key.shape[1] < query.shape[1]}
    attended = [torch.nn.functional.scaled_dot_product_attention(*row, **options).transpose(1, 2) for row in rows]
    return torch.cat(attended, dim=1), None


def attend_repeated_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: object,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """`attend_rows`, with as many key and value heads as query heads."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    return attend_rows(module, query, key, value, *rest, **kwargs)


# registered without a mask function: transformers makes no mask, and reads no value of a batch to decide on one
AttentionInterface.register("varlen", attend_varlen)
AttentionInterface.register("rows", attend_rows)
AttentionInterface.register("repeated_rows", attend_repeated_rows)


@contextmanager
def attention(model: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Inside the context, the model attends with one of the KERNELS, and but for STOCK takes only training batches."""
    model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.set_attn_implementation(STOCK)
