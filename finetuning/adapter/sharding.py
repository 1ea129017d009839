"""Weights that lie in parts on several GPUs, with FSDP or DeepSpeed's ZeRO-3: reading them takes all processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled


@contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside the context, parameters that ZeRO-3 has divided are whole; without ZeRO-3 nothing happens."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # not a requirement

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a whole parameter; a copy of them, if ZeRO-3 has divided it."""
    if not is_deepspeed_zero3_enabled():
        return parameter.detach()
    with gathered([parameter]):
        return parameter.detach().clone()


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; what ZeRO-3 leaves in its place has the shape (0,)."""
    return parameter.ds_shape if is_deepspeed_zero3_enabled() else parameter.shape


def whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, put together from the parts that FSDP has made of the tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
