"""The loss in chunks: of the logits, 152k numbers for each token, only those of a few tokens are in memory at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetuning.preprocessing.encode import IGNORE_INDEX

LOGITS_MEMORY = 2**27  # bytes of float32 logits in memory at once: 128 MiB, 220 tokens of Qwen's vocabulary
# The gradient is scaled before it becomes half precision: most of 152k probabilities are below float16's smallest
# number, 6e-8. A power of two changes no digit, and float16 has room for it unless lm_head has weights above 8.
GRADIENT_SCALE = 2048.0


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, and its gradient for `hidden`, chunk by chunk in one pass.

    The weights of lm_head are frozen, so a chunk's gradient, softmax minus one-hot, is known as soon as its logits are,
    and no logits have to be kept for the backward pass.

    PyTorch 2.13 has `torch.nn.functional.linear_cross_entropy`, which works alike, in about the same time and with
    more memory (1,000 tokens, vocabulary 151,936 x 896, float32, chunks of 220 tokens: 7.8 CPU seconds and 0.22 GiB
    against 8.0 and 0.14 here). In float16 its gradient is thirty times less exact than that of the stock loss and of
    this one (2.0e-2 against 5.9e-4 and 5.4e-4 at a target probability of 0.998 and a loss scale of 1,024), and older
    versions of torch lack it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the tokens' cross-entropies, divided by `divisor`.

        Args:
            hidden: (N, hidden_size). weight: (vocabulary, hidden_size).
            targets: (N,) token ids, or IGNORE_INDEX for tokens that do not count.
        """
        counted = (targets != IGNORE_INDEX).float().unsqueeze(1)
        targets = targets.clamp(min=0).unsqueeze(1)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # only the divisor's digits count here, its power of two in `backward`: so the gradient is rounded only once
        digits, exponent = torch.frexp(divisor.float())  # 0.5 <= digits < 1
        tokens = max(1, LOGITS_MEMORY // (4 * len(weight)))
        for start in range(0, len(hidden), tokens):
            part = slice(start, start + tokens)
            logits = (hidden[part].to(weight.dtype) @ weight.T).float()
            of_targets = logits.gather(1, targets[part])
            largest = logits.amax(dim=1, keepdim=True)
            logits.sub_(largest).exp_()  # in place, here and below: only one chunk is in memory
            sums = logits.sum(dim=1, keepdim=True)
            total += ((sums.log() + largest - of_targets) * counted[part]).sum()
            if gradient is not None:
                scale = GRADIENT_SCALE / digits * counted[part]
                logits.mul_(scale / sums).scatter_add_(1, targets[part], -scale)  # their gradient
                gradient[part] = logits.to(weight.dtype) @ weight
            del logits  # before the next chunk is made
        ctx.save_for_backward(gradient, exponent)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, exponent = ctx.saved_tensors
        return (gradient.float() * torch.ldexp(scale / GRADIENT_SCALE, -exponent)).to(gradient.dtype), None, None, None


class ChunkedLoss:
    """A `compute_loss_func` for the Trainer that needs the hidden states before a frozen lm_head, not the logits."""

    def __init__(self, head: torch.nn.Linear) -> None:
        if head.weight.requires_grad:
            raise ValueError("lm_head is trained: its own gradient needs the logits")
        self.head = head

    @contextmanager
    def instead_of_logits(
        self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Iterator[None]:
        """Inside the context, a forward computes this loss before lm_head, which gets a single position.

        It happens inside the forward because FSDP and ZeRO-3 put lm_head's weights together only there, in a hook that
        runs between these two. Nothing goes back through lm_head, so that they need no weights for it then.

        Args:
            labels: (B, K) what each position of the hidden states predicts: `shift_labels` of the collators.
            num_items_in_batch: what the sum is divided by; None for the number of labels.
        """
        targets = labels.flatten()
        divisor = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        divisor = torch.as_tensor(divisor, device=targets.device).clamp(min=1)  # a process may have no row at the end

        def keep_hidden(head: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            self.hidden = args[0].flatten(0, -2)
            return args[0][:, :1].detach()

        def compute(head: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            self.loss = ChunkedCrossEntropy.apply(self.hidden, head.weight, targets, divisor)

        hooks = [self.head.register_forward_pre_hook(keep_hidden, prepend=True)]
        hooks.append(self.head.register_forward_pre_hook(compute))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.hidden = self.loss = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the last forward. The Trainer's arguments repeat what `instead_of_logits` was told."""
        return self.loss
