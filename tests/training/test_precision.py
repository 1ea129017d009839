"""Half precision, with CPU autocast and GradScaler: exact gradients, skipped steps, float32 adapters."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from support import Run, adapter_weights, difference, logged, make_model, make_rows, make_tokenizer, save_checkpoint
from torch.nn.functional import cross_entropy, linear
from transformers import Trainer

import common
import train_lora
import train_prompt_tuning
from finetuning.training import callbacks
from finetuning.training import trainer as trainer_module
from finetuning.training.callbacks import NotFiniteGuard
from finetuning.training.collators import FlattenCollator
from finetuning.training.losses import ChunkedCrossEntropy

VOCABULARY, HIDDEN, TOKENS = 151_936, 48, 6


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
@pytest.mark.parametrize("confidence", [0, 10, 20, 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_as_exact_as_the_stock_path(dtype: torch.dtype, confidence: int, loss_scale: float) -> None:
    """Trap 82: against float64, at target probabilities of 1e-5, 0.05, 0.97 and 0.999."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    rows = weight[targets].float()
    noise = torch.randn(TOKENS, HIDDEN, generator=generator) if confidence == 0 else 0
    base = (confidence * rows / rows.square().sum(dim=1, keepdim=True) + noise).to(dtype)

    exact = base.double().requires_grad_()
    logits = exact @ weight.double().T
    cross_entropy(logits, targets).backward()
    probability = logits.softmax(dim=1).gather(1, targets.unsqueeze(1)).mean().item()
    assert probability == pytest.approx({0: 0, 10: 0.05, 20: 0.97, 30: 0.999}[confidence], abs=2e-3)

    errors = []
    for ours in (True, False):
        trained = torch.zeros(TOKENS, HIDDEN, requires_grad=True)  # float32, like an adapter
        optimizer, scaler = torch.optim.SGD([trained]), torch.amp.GradScaler("cpu", init_scale=loss_scale)
        with torch.autocast("cpu", dtype=dtype):
            hidden = base + trained.to(dtype)
            if ours:
                loss = ChunkedCrossEntropy.apply(hidden, weight, targets, torch.tensor(TOKENS))
            else:
                loss = cross_entropy(linear(hidden, weight).float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        errors.append(((trained.grad - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[0] < 1.05 * errors[1], errors  # 5%: where both are at the limit of rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uncast_inputs_change_no_gradient(dtype: torch.dtype) -> None:
    """Trap 81: under autocast PEFT's cast to float32 is undone at once; outside of it, answers still need it."""
    model = get_peft_model(make_model().to(dtype), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients, kept = [], []
    for active in (False, True):
        sizes = {}
        pack = lambda tensor, sizes=sizes: (sizes.update({tensor.data_ptr(): tensor.nbytes}), tensor)[1]  # noqa: E731
        context = disable_input_dtype_casting(model, active)
        with context, torch.autocast("cpu", dtype=dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**FlattenCollator()(make_rows())).loss
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters))
        kept.append(sum(sizes.values()))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert kept[1] <= kept[0]
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))  # outside autocast: the cast is there again


@pytest.mark.parametrize("half_precision", [False, True])
def test_inputs_are_uncast_in_training_only(
    run_main: Run, flags: list[str], monkeypatch: pytest.MonkeyPatch, half_precision: bool
) -> None:
    """Trap 81, in a run: fp16 is only said here, after the Trainer is made, because this machine cannot do it."""
    layers, seen = [], []

    def make_trainer(model: torch.nn.Module, *args: object) -> Trainer:
        trainer = trainer_module.make_trainer(model, *args)
        trainer.args.bf16 = half_precision
        layers.append(model.get_base_model().model.layers[0].self_attn.q_proj)
        model.register_forward_pre_hook(lambda *args: seen.append(layers[0].cast_input_dtype_enabled))
        return trainer

    monkeypatch.setattr(common, "make_trainer", make_trainer)
    run_main(train_lora, *flags, "--max_steps", 1)
    assert set(seen) == {not half_precision} and layers[0].cast_input_dtype_enabled


def test_overflows_end_no_run_while_the_scale_comes_down() -> None:
    """Trap 84: from 65,536 down to 1; below that, the gradients are too large without any scale."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu")
    guard = NotFiniteGuard(scaler)
    args, state = SimpleNamespace(fp16=True, output_dir="out"), SimpleNamespace(global_step=1)

    def overflow() -> None:
        optimizer.zero_grad()
        scaler.scale(parameter * float("inf")).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        guard.on_log(args, state, None, {"loss": 1.0, "grad_norm": float("inf")})

    for _ in range(16):
        overflow()
    assert scaler.get_scale() == 1
    guard.on_log(args, state, None, {"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(SystemExit):
        overflow()
    with pytest.raises(SystemExit):  # a loss is never excused
        NotFiniteGuard(torch.amp.GradScaler("cpu")).on_log(args, state, None, {"loss": float("nan")})
    with pytest.raises(SystemExit):  # nor a norm without fp16
        args.fp16 = False
        NotFiniteGuard(None).on_log(args, state, None, {"grad_norm": float("inf")})


@pytest.mark.parametrize(
    ("losses", "elsewhere", "fp16", "scaler", "stops"),
    [
        ({2: 1.5}, [], False, False, True),
        ({2: 1.5}, [], True, True, True),
        ({2: 0.0}, [1.5], False, False, True),  # the rows of another process
        ({1: 1.5, 2: 0.0}, [0.0], False, False, False),  # no supervised tokens in the last step
        ({1: 1.5, 2: 1e-4}, [], True, True, False),  # learnt: the gradient is below float16's smallest number
        ({2: 1.5}, [], True, False, False),  # DeepSpeed, before the first step without an overflow
    ],
)
def test_a_gradient_of_0_ends_the_run_if_there_is_something_to_learn(
    losses: dict[int, float],
    elsewhere: list[float],
    fp16: bool,
    scaler: bool,
    stops: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trap 106, whatever the cause. The logged loss is the mean of several steps, the norm is of the last one."""
    monkeypatch.setattr(callbacks, "gather_object", lambda mine: [*mine, *elsewhere])
    guard = NotFiniteGuard(torch.amp.GradScaler("cpu") if scaler else None)
    for guard.step, loss in losses.items():
        guard.record([guard.step], torch.tensor(loss))
    with pytest.raises(SystemExit) if stops else nullcontext() as stop:
        logs = {"loss": 1.0, "grad_norm": 0.0}
        guard.on_log(SimpleNamespace(fp16=fp16, output_dir="out"), SimpleNamespace(global_step=2), None, logs)
    if stops:
        assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: step 2: the gradient norm is 0") == stops


@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_a_run_without_gradients(
    run_main: Run, flags: list[str], tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 106, in runs. Half of LoRA has no gradient in its first step, and clipping may be off: no reason to stop."""
    flags = [*flags, "--logging_steps", "1", "--save_steps", "1", "--max_steps", "2", "--max_grad_norm", "0"]
    run_main(script, *flags, "--output_dir", tmp_path / "trained", "--keep_checkpoints", True)
    assert len(logged(tmp_path / "trained", "grad_norm")) == 2 and min(logged(tmp_path / "trained", "grad_norm")) > 0

    def lose_gradients(model: torch.nn.Module) -> None:
        trainer_module.prepare_adapter(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(common, "prepare_adapter", lose_gradients)
    assert "step 1: the gradient norm is 0" in run_main(script, *flags, expected=1)
    assert not list((tmp_path / "out").iterdir())


def test_the_rows_of_another_process_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of two processes the second had the bad row, a step before the log; the first one's losses are all finite."""
    monkeypatch.setattr(callbacks, "gather_object", lambda mine: [*mine, (1, [7])])
    guard, state = NotFiniteGuard(None), SimpleNamespace(global_step=2)
    for guard.step in (1, 2):
        guard.record([guard.step], torch.tensor(1.0))
    with pytest.raises(SystemExit):
        guard.on_log(SimpleNamespace(fp16=False, output_dir="out"), state, None, {"loss": float("nan")})
    assert "step 1 (rows 7 of the data file): loss is nan" in capsys.readouterr().err


def test_few_losses_wait_for_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """With --logging_strategy no there is none. The first bad losses are not forgotten."""
    guard = NotFiniteGuard(None)
    for step in range(1, 10_000):
        guard.on_step_begin(None, SimpleNamespace(global_step=step - 1), None)
        guard.record([step], torch.tensor(float("nan") if step > 2000 else 1.0))
        assert len(guard.forwards) <= callbacks.MOST_LOSSES + 1
    with pytest.raises(SystemExit):
        guard.on_log(
            SimpleNamespace(fp16=False, output_dir="out"), SimpleNamespace(global_step=step), None, {"loss": math.nan}
        )
    assert "step 2001 (rows 2001 of the data file): loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])  # with biases and without
def test_an_evaluation_changes_no_4bit_training(
    run_main: Run, flags: list[str], rows_path: str, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 106: on a CPU with AVX512-BF16, bitsandbytes has a kernel for answers that lets no gradient through."""

    def without_gradient(states: torch.Tensor, weight: torch.Tensor, out: None, state: QuantState) -> torch.Tensor:
        return torch.zeros(*states.shape[:-1], state.shape[0]).requires_grad_(states.requires_grad)

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.functional.gemv_4bit", without_gradient)
    model = make_model(model_type, hidden_size=64, head_dim=16)
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), model)
    words = f"--model_path {path} --load_in_4bit True --lora_dropout 0 --eval_metrics False --save_steps 6"
    for name, more in {"with": f"--eval_data_path {rows_path} --eval_strategy steps --eval_steps 3", "out": ""}.items():
        printed = run_main(train_lora, *flags, *words.split(), *more.split(), "--output_dir", tmp_path / name)
        assert ("evaluation, " in printed) == (name == "with")
    assert difference(tmp_path / "with", tmp_path / "out") == 0.0


@pytest.mark.parametrize("more", ["", "--load_in_4bit True"])
@pytest.mark.parametrize("script", [train_lora, train_prompt_tuning])
def test_fp16_full_eval(
    run_main: Run, flags: list[str], rows_path: str, tmp_path: Path, script: ModuleType, more: str
) -> None:
    """The Trainer would cast the whole model, adapter too, but only outside of training, where we do not evaluate."""
    words = f"--fp16_full_eval True --eval_data_path {rows_path} --eval_strategy steps --eval_steps 3 {more}".split()
    printed = run_main(script, *flags, *words, "--eval_metrics", False, "--model_path", "models/tiny-qwen")
    assert printed.count("  evaluation, ") == 2
    assert {tensor.dtype for tensor in adapter_weights(tmp_path / "out").values()} == {torch.float32}
