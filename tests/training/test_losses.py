"""losses.py and attention.py: the loss and the gradients of transformers, in less memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import FLAT, HYBRID, TOKENS, loss_alone, make_model, make_rows, make_soft
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.training import losses
from finetuning.training.attention import attention as attention_context
from finetuning.training.collators import FlattenCollator, PadCollator, can_flatten
from finetuning.training.losses import ChunkedCrossEntropy, put_loss_head
from finetuning.training.trainer import make_trainer


def attention(model: torch.nn.Module) -> AbstractContextManager:
    """As during `FineTuningTrainer.train`; a backward pass with checkpointing needs it too."""
    return attention_context(model, "rows")


def fast_loss(model: torch.nn.Module, batch: dict[str, Any], items: torch.Tensor | None = None) -> torch.Tensor:
    """The loss as `FineTuningTrainer` computes it."""
    base = model.get_base_model() if isinstance(model, SoftPromptModel) else model
    return put_loss_head(base).loss(model, batch, items)


def train_one_step(model: torch.nn.Module, folder: Path) -> Trainer:
    """A step on all of `make_rows`, and an evaluation."""
    args = TrainingArguments(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    args.remove_unused_columns, args.prediction_loss_only = False, True
    args.per_device_train_batch_size = args.per_device_eval_batch_size = len(make_rows())
    trainer = make_trainer(model, 0, args, make_rows(), make_rows())
    assert trainer.args is args
    trainer.train()
    trainer.evaluate()
    return trainer


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
    before, names, head = model(**batch), dict(model.named_parameters()), model.lm_head.weight
    with torch.no_grad(), attention(model):
        for _ in range(2):  # a second Trainer of the same model
            assert fast_loss(model, batch).item() == pytest.approx(before.loss.item(), rel=1e-6)
    with pytest.raises(IndexError):  # as when memory runs out in the middle of a step
        fast_loss(model, batch | {"input_ids": batch["input_ids"] + 1000})
    after = model(**batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert dict(model.named_parameters()) == names and model.lm_head.weight is head
    assert isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.out_features == 264  # to adapt, or to merge


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_stay_tied(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    freeze_vocabulary(model)
    put_loss_head(model)
    model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.state_dict().keys() == make_model(tie_word_embeddings=tied).state_dict().keys()


def test_a_turn_without_rows() -> None:
    """With --average_tokens_across_devices False a process counts its own labels, and may have none at the end."""
    model = make_model()
    freeze_vocabulary(model)
    batch = FlattenCollator()([{"input_ids": [1, 2], "labels": [IGNORE_INDEX] * 2}])
    with attention(model):
        assert fast_loss(model, batch, torch.tensor(0)) == 0


def test_the_trainer_computes_no_logits(tmp_path: Path) -> None:
    model, outputs = make_soft(), []
    expected = model(**FlattenCollator(TOKENS)(make_rows())).loss.item()
    model.register_forward_hook(lambda *args: outputs.append(args[-1].logits))
    history = train_one_step(model, tmp_path).state.log_history
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-5) and history[1]["eval_loss"] < expected
    assert [output.shape for output in outputs] == [(), ()]  # of the step and of the evaluation


@pytest.mark.parametrize("changed", ["trained", "bias", "LoRA", "LoRA and whole"])
def test_other_heads_get_the_stock_loss(changed: str, tmp_path: Path) -> None:
    """The chunked loss gives no gradient to lm_head or to an adapter of it, and knows no bias."""
    model = make_model()
    freeze_vocabulary(model)
    if changed == "trained":
        model.lm_head.weight.requires_grad = True
    elif changed == "bias":
        model.lm_head = torch.nn.Linear(32, 264).requires_grad_(False)
    else:
        names = {"target_modules": ["lm_head"]} if changed == "LoRA" else {"modules_to_save": ["lm_head"]}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | names)))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    expected = model(**FlattenCollator()(make_rows())).loss.item()
    history = train_one_step(model, tmp_path).state.log_history
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-5) and history[1]["eval_loss"] < expected
    unchanged = {name for name, value in model.named_parameters() if name in before and value.equal(before[name])}
    assert not {name for name in unchanged if "lora_A" not in name}  # whose gradient is 0 while lora_B is


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


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="PyTorch before 2.13")
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
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64, acc_dtype=torch.float32)
    library_loss = torch.nn.functional.linear_cross_entropy
    library = error(lambda hidden: library_loss(hidden, weight, targets, options=options).float())
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
