"""Batches without padding give the loss and the gradients of rows alone (traps 25 and 25b)."""

import pytest
import torch
from support import FLAT, HYBRID, loss_alone, make_model, make_rows
from transformers import AutoConfig

from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten, needs_no_mask


def test_flattened_batch_literally() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3]},
        {"input_ids": [4, 5], "labels": [4, 5]},
    ]
    batch = FlattenCollator()(rows)
    assert batch.pop("use_cache") is False
    assert batch.pop("row_lengths") == [3, 2] and batch.pop("max_length_q") == batch.pop("max_length_k") == 3
    assert batch["cu_seq_lens_q"].dtype == torch.int32  # as the kernel wants it
    assert torch.equal(batch.pop("cu_seq_lens_k"), batch["cu_seq_lens_q"])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "logits_to_keep": [0, 1, 3],  # token 3 does not predict token 4 of the next row
        "labels": [[2, 3, 5]],
        "shift_labels": [[2, 3, 5]],
    }


def test_padded_batch_literally() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, IGNORE_INDEX, 3]},
        {"input_ids": [4, 5], "labels": [IGNORE_INDEX, 5]},
    ]
    batch = PadCollator(pad_token_id=9)(rows)
    assert batch.pop("use_cache") is False
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 5, 9]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "logits_to_keep": [0, 1],
        "labels": [[IGNORE_INDEX, 3], [5, IGNORE_INDEX]],
        "shift_labels": [[IGNORE_INDEX, 3], [5, IGNORE_INDEX]],
    }


def test_which_models_may_be_flattened() -> None:
    for model_type in FLAT:
        assert can_flatten(make_model(model_type).config)
    for model_type in HYBRID:
        assert not can_flatten(make_model(model_type).config)
    for model_type in ("mamba", "llama"):  # recurrent without saying so, or simply not tried
        assert not can_flatten(AutoConfig.for_model(model_type))
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding_attention" in sliding.config.layer_types
    assert not can_flatten(sliding.config)
    window = AutoConfig.for_model(
        "qwen3_moe", use_sliding_window=True, sliding_window=4
    )  # in all layers, without a list
    assert not can_flatten(window) and not needs_no_mask(window)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("model_type", FLAT + HYBRID)
def test_batch_loss_is_the_sum_of_rows_alone(model_type: str, mode: str) -> None:
    model = make_model(model_type).train(mode == "train")
    model.config.use_cache = True  # the default of a loaded model: the batch itself has to turn it off (trap 25b)
    rows = make_rows()
    collator = FlattenCollator() if can_flatten(model.config) else PadCollator(pad_token_id=0)
    expected = sum(loss_alone(model, row) for row in rows)
    expected_gradients = torch.autograd.grad(
        expected, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    batch = collator(rows)
    loss = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", HYBRID)
def test_flattening_a_hybrid_would_leak(model_type: str) -> None:
    """Why `can_flatten` says no: the recurrent state of one row reaches the next."""
    model = make_model(model_type)
    rows = make_rows()
    expected = sum(loss_alone(model, row) for row in rows).item()
    batch = FlattenCollator()(rows) | {"num_items_in_batch": torch.tensor(1)}
    with pytest.raises(ValueError, match="packed sequences"):  # as transformers can tell by `cu_seq_lens_q`
        model(**batch)
    del batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]
    assert abs(model(**batch).loss.item() - expected) > 1e-3 * expected


def test_cache_would_mix_rows() -> None:
    """Why the batch holds use_cache=False: with a cache, transformers does not look for row boundaries."""
    model = make_model()
    batch = FlattenCollator()(make_rows())
    right = model(**batch).loss.item()
    assert abs(model(**batch | {"use_cache": True}).loss.item() - right) > 1e-3
