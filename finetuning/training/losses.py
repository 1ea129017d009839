"""The loss in chunks: of the logits, 152k numbers for each token, only those of a few tokens are in memory at once."""

from typing import Any

import torch
from transformers import PreTrainedModel

from finetuning.preprocessing.encode import IGNORE_INDEX

LOGITS_MEMORY = 2**27  # bytes of float32 logits in memory at once: 128 MiB, 220 tokens of Qwen's vocabulary
# The gradient is scaled before it becomes half precision: most of 152k probabilities are below float16's smallest
# number, 6e-8. A power of two changes no digit, and float16 has room for it unless lm_head has weights above 8.
GRADIENT_SCALE = 2048.0


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, and its gradient for `hidden`, chunk by chunk in one pass.

    The weights of lm_head are frozen, so a chunk's gradient, softmax minus one-hot, is known as soon as its logits are,
    and no logits have to be kept for the backward pass.

    PyTorch 2.13 has `torch.nn.functional.linear_cross_entropy`, about as fast (1,000 tokens, vocabulary 151,936 x 896,
    float32: 7.8 CPU seconds and 0.22 GiB, 8.0 and 0.14 here). But in float16 its gradient is thirty times less exact:
    2.0e-2, stock loss 5.9e-4, here 5.4e-4, at a target probability of 0.998 and a loss scale of 1,024.
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
        # divided by the mantissa here and by the power of two in `backward`: the gradient is rounded only once
        mantissa, exponent = torch.frexp(divisor.float())  # 0.5 <= mantissa < 1
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
                scale = GRADIENT_SCALE / mantissa * counted[part]
                logits.mul_(scale / sums).scatter_add_(1, targets[part], -scale)  # their gradient
                gradient[part] = logits.to(weight.dtype) @ weight
            del logits  # before the next chunk is made
        ctx.save_for_backward(gradient, exponent)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, exponent = ctx.saved_tensors
        return (gradient.float() * torch.ldexp(scale / GRADIENT_SCALE, -exponent)).to(gradient.dtype), None, None, None


class LossHead(torch.nn.Linear):
    """A frozen lm_head that gives the loss, and not the logits, while it has targets.

    The loss is computed in this module's own forward because only for that do FSDP and ZeRO-3 gather its weight.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the same parameter, under the same name
        self.targets: tuple[torch.Tensor, torch.Tensor] | None = None  # and the divisor of `ChunkedCrossEntropy`

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """From (B, K, hidden_size) to logits (B, K, vocabulary) or, with targets, to their loss (a number)."""
        if self.targets is None:
            return super().forward(hidden)
        return ChunkedCrossEntropy.apply(hidden.flatten(0, -2), self.weight, *self.targets)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a batch of the collators: the sum of its tokens' cross-entropies, divided.

        Args:
            model: whose lm_head this is, perhaps in an adapter or an engine.
            num_items_in_batch: what the sum is divided by; None for the number of labels.
        """
        targets = batch["labels"].flatten()
        divisor = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        divisor = torch.as_tensor(divisor, device=targets.device).clamp(min=1)  # a process may have no row at the end
        self.targets = targets, divisor
        try:
            return model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        finally:
            self.targets = None


def put_loss_head(model: PreTrainedModel) -> LossHead | None:
    """Put a LossHead in the place of lm_head, before FSDP or DeepSpeed takes the model over.

    Returns None, and changes nothing, if lm_head is trained or is more than a matrix: then the loss needs the logits.
    """
    head = model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, LossHead) or head.weight.requires_grad or head.bias is not None:
        return None
    if type(head) is torch.nn.Linear:
        head = LossHead(head)
        model.set_output_embeddings(head)
    return head
