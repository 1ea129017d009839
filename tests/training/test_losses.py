"""losses.py and attention.py: the loss and the gradients of transformers, in less memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support import FLAT, HYBRID, TOKENS, loss_alone, make_model, make_rows, make_soft
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.training import losses
from finetuning.training.attention import attention as attention_context
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten
from finetuning.training.losses import ChunkedCrossEntropy, ChunkedLoss


def attention(model: torch.nn.Module) -> AbstractContextManager:
    """As during `FineTuningTrainer.train`; a backward pass with checkpointing needs it too."""
    return attention_context(model, "rows")


def fast_loss(model: torch.nn.Module, batch: dict[str, Any], items: torch.Tensor | None = None) -> torch.Tensor:
    """The loss as `FineTuningTrainer` computes it."""
    base = model.get_base_model() if isinstance(model, SoftPromptModel) else model
    chunked = ChunkedLoss(base.get_output_embeddings())
    labels = batch.pop("labels")
    with chunked.instead_of_logits(labels, items):
        output = model(**batch)
        assert output.logits.shape[:2] == (len(labels), 1)  # of a single position
        return chunked(output, labels)


def freeze_vocabulary(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    model.get_input_embeddings().weight.requires_grad = False
    model.get_output_embeddings().weight.requires_grad = False
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointing"])
@pytest.mark.parametrize("tokens_at_a_time", [1, 5, 1000])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_batch_loss_is_the_sum_of_rows_alone(
    model_type: str, tokens_at_a_time: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_MEMORY", tokens_at_a_time * 4 * 264)
    model, rows = make_model(model_type).train(mode != "eval"), make_rows()
    parameters = freeze_vocabulary(model)
    expected = sum(loss_alone(model, row) for row in rows)
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator = FlattenCollator() if can_flatten(model.config) else PadCollator(pad_token_id=0)
    with attention(model):
        mean = fast_loss(model, collator(rows))
        loss = fast_loss(model, collator(rows), torch.tensor(1))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    supervised = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mean.item() == pytest.approx(expected.item() / supervised, rel=1e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_soft_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a prompt that lies in front of each row."""
    monkeypatch.setattr(losses, "LOGITS_MEMORY", 3 * 4 * 264)
    gradients = []
    for slow in (True, False):
        model, batch = make_soft("qwen3"), FlattenCollator(TOKENS)(make_rows())
        with nullcontext() if slow else attention(model.get_base_model()):
            loss = model(**batch).loss if slow else fast_loss(model, batch)
            loss.backward()
        gradients.append(model.prompt.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was() -> None:
    model, batch = make_model(), FlattenCollator()(make_rows())
    freeze_vocabulary(model)
    before = model(**batch)
    with torch.no_grad(), attention(model):
        assert fast_loss(model, dict(batch)).item() == pytest.approx(before.loss.item(), rel=1e-6)
    after = model(**batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


def test_a_turn_without_rows() -> None:
    """With --average_tokens_across_devices False a process counts its own labels, and may have none at the end."""
    model = make_model()
    freeze_vocabulary(model)
    batch = FlattenCollator()([{"input_ids": [1, 2], "labels": [IGNORE_INDEX] * 2}])
    chunked = ChunkedLoss(model.get_output_embeddings())
    with attention(model), chunked.instead_of_logits(batch.pop("labels"), torch.tensor(0)):
        model(**batch)
        assert chunked() == 0


def test_trained_head_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_head"):
        ChunkedLoss(make_model().lm_head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The gradient stays within half precision's own error, at a loss scale of 65,536 too."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(5000, 32, generator=generator)).to(dtype)
    targets = torch.randint(0, 5000, (40,), generator=generator)
    targets[::7] = IGNORE_INDEX
    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().T
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / 34
    (65536 * loss).backward()
    half = hidden.clone().requires_grad_()
    found = ChunkedCrossEntropy.apply(half, weight, targets, torch.tensor(34))
    (65536 * found).backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(loss.item(), rel=2e-3)
    assert half.grad.isfinite().all()
    error = (half.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < (2e-3 if dtype == torch.float16 else 1.5e-2)


def test_the_librarys_own_loss_is_less_exact() -> None:
    """Why ChunkedCrossEntropy is there. When this fails, PyTorch's own loss may take its place."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(5000, 256, generator=generator)
    targets = torch.randint(0, 5000, (128,), generator=generator)
    hidden = 15 * weight[targets] / weight[targets].square().sum(dim=1, keepdim=True)  # confident, as after training
    weight, hidden = weight.half(), hidden.half()

    def error(loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
        exact, half = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
        cross_entropy(exact @ weight.double().T, targets).backward()
        (1024 * loss(half)).backward()
        return ((half.grad.double() / 1024 - exact.grad).norm() / exact.grad.norm()).item()

    stock = error(lambda hidden: cross_entropy((hidden @ weight.T).float(), targets))
    ours = error(lambda hidden: ChunkedCrossEntropy.apply(hidden, weight, targets, torch.tensor(128)))
    options = LinearCrossEntropyOptions(batch_chunk_size=64, acc_dtype=torch.float32)
    library = error(lambda hidden: linear_cross_entropy(hidden, weight, targets, options=options).float())
    assert ours < stock and library > 4 * stock, (stock, ours, library)


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward and backward pass is larger than a chunk of logits and the weights."""
    monkeypatch.setattr(losses, "LOGITS_MEMORY", 10 * 4 * 5000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(300, 8, requires_grad=True), torch.randn(5000, 8)
    with Watch():
        ChunkedCrossEntropy.apply(hidden, weight, torch.arange(300), torch.tensor(300)).backward()
    assert hidden.grad is not None and largest == 10 * 5000


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would hold T x T numbers for all rows together; attention needs those of each row."""
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        shapes.append((query.shape[2], attn_mask))
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    model, rows = make_model(), make_rows()
    freeze_vocabulary(model)
    with attention(model):
        fast_loss(model, FlattenCollator()(rows))
    assert shapes == [(len(row["input_ids"]), None) for row in rows] * model.config.num_hidden_layers
