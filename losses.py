"""The loss without the logits: of Qwen's 152k numbers a token, only some tokens' are in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from collators import IGNORE_INDEX

LOGITS_MEMORY = 2**27  # bytes of float32 logits at a time: 128 MiB, 220 tokens of Qwen's vocabulary


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, and its gradient for `hidden`, chunk by chunk in one pass.

    The weights of lm_head are frozen, so the gradient that their logits pass on is known as soon as the logits are,
    softmax minus one-hot, and no logits have to wait for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the tokens' cross-entropies, divided by `divisor`.

        Args:
            hidden: (N, hidden_size). weight: (vocabulary, hidden_size).
            targets: (N,) token ids, IGNORE_INDEX where there is none.
        """
        counted = (targets != IGNORE_INDEX).unsqueeze(1)
        targets = targets.clamp(min=0).unsqueeze(1)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        tokens = max(1, LOGITS_MEMORY // (4 * len(weight)))
        for start in range(0, len(hidden), tokens):
            part = slice(start, start + tokens)
            logits = (hidden[part].to(weight.dtype) @ weight.T).float()
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += ((normalizer - logits.gather(1, targets[part])) * counted[part]).sum()
            if gradient is not None:
                probabilities = logits.sub_(normalizer).exp_()
                probabilities.scatter_add_(1, targets[part], torch.full_like(normalizer, -1.0))
                gradient[part] = probabilities.mul_(counted[part]).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient, divisor)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, divisor = ctx.saved_tensors
        return (gradient.float() * (scale / divisor)).to(gradient.dtype), None, None, None


@contextmanager
def chunked_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's forward gives its loss as ever, and hidden states where its output says `logits`."""
    head, loss_function = model.get_output_embeddings(), model.loss_function
    if head.weight.requires_grad:
        raise ValueError("lm_head is trained: its own gradient needs the logits")

    def loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        targets = shift_labels.flatten()
        divisor = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        divisor = torch.as_tensor(divisor, device=targets.device)
        return ChunkedCrossEntropy.apply(logits.flatten(0, -2), head.weight, targets, divisor)

    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        del head.forward
        model.loss_function = loss_function
