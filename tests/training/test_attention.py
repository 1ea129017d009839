"""attention.py: which kernel trains where, and that all train the same. `varlen_attn` needs a GPU: a stand-in here."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import FLAT, HYBRID, TOKENS, make_model, make_rows, make_soft
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from finetuning.training import attention as module
from finetuning.training.attention import STOCK, attention, choose_attention, missing_packages, torch_has_varlen
from finetuning.training.collators import FlattenCollator, PadCollator


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """`varlen_attn`, causal, as its documentation describes it, in plain arithmetic."""
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert cu_seq.dtype == torch.int32
    starts = cu_seq.tolist()
    assert longest == max(end - start for start, end in zip(starts, starts[1:], strict=False))
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    outputs = []
    for start, end in zip(starts, starts[1:], strict=False):
        q, k, v = (states[start:end].float() for states in (query, key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(dim=-1), v))
    return torch.cat(outputs).to(query.dtype)


def varlen_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: object = None,
) -> torch.Tensor:
    """The signature of PyTorch 2.10."""
    assert is_causal and query.shape == key.shape == value.shape
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return reference(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5)


def varlen_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    assert window_size == (-1, 0) and query.shape == key.shape == value.shape
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return reference(query, key, value, cu_seq_q, max_q, scale or query.shape[-1] ** -0.5)


def varlen_2_12(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """The signature of PyTorch 2.12 and 2.13."""
    assert window_size == (-1, 0) and enable_gqa and key.shape[1] < query.shape[1]  # nothing is repeated
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return reference(query, key, value, cu_seq_q, max_q, scale or query.shape[-1] ** -0.5)


STAND_INS = [varlen_2_10, varlen_2_11, varlen_2_12]


def make_adapted(model_type: str, method: str) -> torch.nn.Module:
    if method == "soft prompt":
        return make_soft(model_type).train()
    model = get_peft_model(
        make_model(model_type), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def parameters_of(function: Callable[..., object]) -> list[tuple[object, ...]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.skipif(module.varlen_attn is None, reason="PyTorch before 2.10")
def test_the_real_kernel_has_the_signature_of_a_stand_in() -> None:
    assert parameters_of(module.varlen_attn) in [parameters_of(stand_in) for stand_in in STAND_INS]


@pytest.mark.parametrize("stand_in", [*STAND_INS, None])
@pytest.mark.parametrize("method", ["LoRA", "soft prompt"])
@pytest.mark.parametrize("model_type", FLAT)
def test_kernels_train_the_same(
    model_type: str, method: str, stand_in: Callable[..., torch.Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of row by row, with two query heads for each key head.

    Trap 110: before PyTorch 2.12, `varlen_attn` wants as many key heads as query heads.
    """
    monkeypatch.setattr(module, "varlen_attn", stand_in)
    model = make_adapted(model_type, method)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for name in ("rows", "varlen" if stand_in else "repeated_rows"):
        with attention(model.get_base_model(), name):
            loss = model(**FlattenCollator(TOKENS if method == "soft prompt" else 0)(make_rows())).loss
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "heads"), [("rows", 2), ("repeated_rows", 4)])
def test_repeated_keys_are_not_shared(kernel: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 79: below compute capability 8.0, `enable_gqa` has no fused kernel."""
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def watch(*states: torch.Tensor, enable_gqa: bool, **more: object) -> torch.Tensor:
        seen.add((*(part.shape[1] for part in states), enable_gqa))
        return sdpa(*states, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    model = make_model()
    with attention(model, kernel):
        model(**FlattenCollator()(make_rows()))
    assert seen == {(4, heads, heads, heads == 2)}


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.float32])
def test_varlen_gets_one_half_precision_dtype(base_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast a float32 base rotates query and key in float32, which the kernel refuses (as `reference`)."""
    seen = []

    @wraps(varlen_2_12)
    def watch(query: torch.Tensor, *args: object, **more: object) -> torch.Tensor:
        seen.append(query.dtype)
        return varlen_2_12(query, *args, **more)

    monkeypatch.setattr(module, "varlen_attn", watch)
    model = make_model().to(base_dtype)
    with attention(model, "varlen"), torch.autocast("cpu", dtype=torch.float16):
        model(**FlattenCollator()(make_rows()))
    assert seen == [torch.float16] * 2


@pytest.mark.parametrize("kernel", ["rows", "repeated_rows"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_padded_rows_need_no_mask(model_type: str, kernel: str) -> None:
    """The loss and the gradients of transformers' own attention with a mask."""
    model, rows = make_model(model_type), make_rows()
    parameters = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    batch = PadCollator(pad_token_id=0)(rows)
    mask = [[1] * len(row["input_ids"]) + [0] * (batch["input_ids"].shape[1] - len(row["input_ids"])) for row in rows]
    masked = {name: value for name, value in batch.items() if name != "position_ids"}
    expected = model(**masked, attention_mask=torch.tensor(mask)).loss
    with attention(model, kernel):
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    for first, second in zip(*pairs, strict=True):
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flattened", "capability", "half", "varlen", "kernel"),
    [
        (True, (9, 0), True, True, "varlen"),
        (True, (8, 0), True, True, "varlen"),
        (True, (12, 0), True, True, "varlen"),
        (True, (8, 6), True, False, "rows"),
        (False, (9, 0), True, True, "rows"),
        (True, (9, 0), False, True, "repeated_rows"),
        (True, (7, 5), True, True, "repeated_rows"),  # trap 79
        (False, (7, 0), True, False, "repeated_rows"),
        (True, None, False, True, "rows"),
        (False, None, False, False, "rows"),
    ],
)
def test_choice(
    flattened: bool,
    capability: tuple[int, int] | None,
    half: bool,
    varlen: bool,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "torch_has_varlen", lambda: varlen)
    assert choose_attention(make_model().config, flattened, capability, half) == kernel


def test_choice_by_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "torch_has_varlen", lambda: True)
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1).config
    assert choose_attention(sliding, False, (9, 0), True) == STOCK  # the windows would be lost
    dropout = make_model(attention_dropout=0.1).config
    assert choose_attention(dropout, True, (9, 0), True) == "rows"  # varlen_attn has none
    assert choose_attention(make_model("qwen3_next").config, False, (7, 5), True) == "repeated_rows"


def test_which_torch_has_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    for built in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda built=built: built)
        for kernel in (*STAND_INS, None):
            monkeypatch.setattr(module, "varlen_attn", kernel)
            assert torch_has_varlen() == (built and kernel is not None)


def test_slow_linear_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages(make_model("qwen2").config) == []
    hybrid = make_model("qwen3_5_text").config
    assert missing_packages(hybrid) == ["flash-linear-attention", "causal-conv1d"]
    monkeypatch.setattr(module, "find_spec", lambda name: name == "fla" or None)
    assert missing_packages(hybrid) == ["causal-conv1d"]


def test_transformers_takes_the_fast_kernels_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why nothing here has to switch them on: a stand-in for flash-linear-attention is found and called."""
    package, rule = ModuleType("fla"), ModuleType("fla.ops.gated_delta_rule")
    package.ops = ModuleType("fla.ops")
    package.ops.gated_delta_rule = rule
    rule.chunk_gated_delta_rule = lambda query: "fast"
    for name, stub in {"fla": package, "fla.ops": package.ops, "fla.ops.gated_delta_rule": rule}.items():
        monkeypatch.setitem(sys.modules, name, stub)
    decorate = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    assert decorate(lambda query: "slow")(query=1) == "fast"
