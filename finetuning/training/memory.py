"""What a step needs, computed from numbers of the model: for the line before a run, a dry run's remedies, and tables.

What a forward pass keeps for the backward pass is counted on a few tokens and grows with the rows; the rest is the
weights, what belongs to the trained ones, and the logits of one chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from finetuning.training.losses import LOGITS_MEMORY

# Bytes of a weight in NF4 with double quantisation: 4 bits, 1 byte for each 64 weights, 4 bytes for each 64 x 256.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER = 12  # bytes of a trained weight beside itself: its gradient and the two numbers of AdamW, in float32


class Size(NamedTuple):
    """How many weights a base model has, and in which parts."""

    layers: int
    layer: int  # weights of one, on average
    matrices: int  # of them in matrices, which 4 bits reach
    largest: int  # of these
    hidden: int  # numbers in a hidden state
    vocab_size: int
    tied: bool = False  # whether lm_head is the embeddings
    width: int = 2  # bytes of a weight that is not in 4 bits

    def vocabulary(self) -> int:
        """Weights of the embeddings, and as many of lm_head."""
        return self.hidden * self.vocab_size

    def weights(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.vocabulary()


class Need(NamedTuple):
    """What a step needs, in bytes."""

    weights: float  # of the base model
    training: float  # trained weights, their gradients and the optimizer's states
    activations: float
    logits: float
    unpacked: float = 0  # weights that are put together, or unpacked, while they are at work

    def total(self) -> float:
        return sum(self)


def measure_size(model: PreTrainedModel, layers: int | None = None) -> Size:
    """Count the weights of a frozen base model, which may have an adapter in it, and lie on the meta device.

    Args:
        layers: of the model, if only some of them are there.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder = model.get_decoder().layers
    linear = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    frozen = [module for module in linear if not module.weight.requires_grad]  # not those of LoRA
    matrices = [module.in_features * module.out_features for module in frozen]
    known = {id(module.weight) for module in linear}
    others = [p.numel() for p in decoder.parameters() if not p.requires_grad and id(p) not in known]
    return Size(
        layers=layers or len(decoder),
        layer=(sum(matrices) + sum(others)) // len(decoder),
        matrices=sum(matrices) // len(decoder),
        largest=max(matrices),
        hidden=embeddings.shape[1],
        vocab_size=embeddings.shape[0],
        tied=head is embeddings,
        width=embeddings.element_size(),
    )


def count_kept_bytes(forward: Callable[[], object]) -> int:
    """The bytes of all tensors that a forward pass keeps for its backward pass, weights included."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # views share theirs
        storages[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def compute_step(
    size: Size,
    kept: float,
    tokens: int,
    trained: int,
    checkpointing: bool = False,
    offload: bool = False,
    in_4bit: bool = False,
    gpus: int = 1,
) -> Need:
    """What a step on so many tokens needs on a GPU; without the CUDA context, about 0.5 GiB.

    Args:
        kept: bytes that a token keeps for the backward pass, in all layers together, without checkpointing.
        trained: weights.
        checkpointing: only the layers' inputs are kept, and a layer is computed again when its turn comes.
        offload: of these inputs to main memory.
        gpus: over which the weights are sharded; 1 for a full copy.
    """
    layer = size.layer * size.width
    if in_4bit:
        layer = size.matrices * NF4 + (size.layer - size.matrices) * size.width
    vocabulary = size.vocabulary() * size.width
    activations = kept * tokens
    if checkpointing:
        activations = activations / size.layers + (0 if offload else size.layers * size.hidden * size.width * tokens)
    half_precision = size.width == 2  # then a chunk of logits is there once more, besides float32
    return Need(
        weights=(size.layers * layer + (1 if size.tied else 2) * vocabulary) / gpus,
        training=trained * (4 + OPTIMIZER),
        activations=activations,
        logits=min(LOGITS_MEMORY, 4 * size.vocab_size * tokens) * (1.5 if half_precision else 1),
        # sharded weights are gathered for two layers, the one at work and the next, and for lm_head
        unpacked=(2 * layer + vocabulary if gpus > 1 else 0) + (size.largest * size.width if in_4bit else 0),
    )
