"""What only a GPU can show. Skipped without one; a few minutes with one:

    GPU_TESTS=1 python -m pytest -n 0 -m gpu tests/gpu

GPU_TESTS=1 because the other tests hide the GPU, to check what happens without one.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import REPOSITORY, STEP, Run, adapter_weights, loss_alone, make_model, make_tokenizer, save_checkpoint
from transformers import TrainerCallback, TrainingArguments

import inference
import train_lora
import train_prompt_tuning
from finetuning.cli.arguments import ModelArguments
from finetuning.generation.generate import generate, make_generation_config
from finetuning.generation.labels import score_labels
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.encode import pad_token_id
from finetuning.preprocessing.templates import set_prompt_format
from finetuning.training.attention import attention, choose_attention, torch_has_varlen
from finetuning.training.collators import FlattenCollator, PadCollator
from finetuning.training.losses import put_loss_head
from finetuning.training.trainer import make_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SCRIPTS = {"lora": train_lora, "prompt_tuning": train_prompt_tuning}
PRECISIONS = {"fp16": [], "bf16": ["--bf16", "True"], "4-bit": ["--load_in_4bit", "True"]}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
LENGTHS = (70, 3, 129, 33, 1, 64, 200, 9)


@pytest.fixture(autouse=True)
def no_cap() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def small_model() -> torch.nn.Module:
    """Head sizes of real Qwens, for which the fast kernels are made."""
    return make_model(hidden_size=256, head_dim=64, intermediate_size=512)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("model"), make_tokenizer(), small_model())


def flags(model_path: str, rows_path: str, out: Path, *more: object) -> list[object]:
    words = f"--model_path {model_path} --data_path {rows_path} --output_dir {out} --max_steps 30 --logging_steps 1"
    words += " --per_device_train_batch_size 4 --disable_tqdm True --learning_rate 0.02"
    return [*words.split(), *more]


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in STEP.findall(printed)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", SCRIPTS)
def test_a_run(
    run_main: Run, model_path: str, rows_path: str, tmp_path: Path, method: str, precision: str, checkpointing: bool
) -> None:
    """Each precision trains, saves a float32 adapter, and answers; fp16's first overflows end no run."""
    more = [*PRECISIONS[precision], "--gradient_checkpointing", checkpointing, "--eval_data_path", rows_path]
    printed = run_main(SCRIPTS[method], *flags(model_path, rows_path, tmp_path / "out", *more))
    assert losses(printed)[-1] < losses(printed)[0] - 0.3 and "| rows |   12 |" in printed
    assert all(tensor.dtype == torch.float32 for tensor in adapter_weights(tmp_path / "out").values())
    info = json.loads((tmp_path / "out/adapter_info.json").read_text(encoding="utf-8"))
    assert info["base_fingerprint"]["dtype"] == ("bfloat16" if precision == "bf16" else "float16")
    assert run_main(inference, "--adapter_path", tmp_path / "out", "--instruction", "Say sun", "--max_new_tokens", 8)


def test_evaluation_in_float16(run_main: Run, model_path: str, rows_path: str, tmp_path: Path) -> None:
    more = ["--fp16_full_eval", True, "--eval_data_path", rows_path, "--eval_strategy", "steps", "--eval_steps", 10]
    printed = run_main(train_lora, *flags(model_path, rows_path, tmp_path / "out", *more))
    assert printed.count("  evaluation, ") == 3
    assert all(tensor.dtype == torch.float32 for tensor in adapter_weights(tmp_path / "out").values())


# ---- attention and loss


def random_rows(seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(0, 256, (length + 1,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def lora_model(dtype: torch.dtype) -> torch.nn.Module:
    model = get_peft_model(small_model().to("cuda", dtype), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to("cuda")
    return model


def loss_and_gradient(dtype: torch.dtype, kernel: str, collator: Any) -> tuple[float, torch.Tensor]:
    """The sum of the rows' losses and the gradient of the adapter, through the project's loss."""
    model = lora_model(dtype)
    batch = collator(random_rows())
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.autocast("cuda", dtype), attention(model.get_base_model(), kernel):
        loss = put_loss_head(model.get_base_model()).loss(model, batch, 1)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("precision", HALF)
def test_kernels_agree(precision: str) -> None:
    """varlen, row by row, keys and values repeated, and padded rows: the loss and the gradient of rows alone."""
    dtype = HALF[precision]
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bfloat16")
    reference = lora_model(torch.float32)
    expected = sum(loss_alone_on_gpu(reference, row) for row in random_rows())
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.requires_grad])
    kernels = ["rows", "repeated_rows"]
    if torch.cuda.get_device_capability() >= (8, 0) and torch_has_varlen():
        kernels.append("varlen")
    runs = {(kernel, "flat"): FlattenCollator() for kernel in kernels} | {("rows", "padded"): PadCollator(0)}
    for (kernel, batch), collator in runs.items():
        loss, found = loss_and_gradient(dtype, kernel, collator)
        tolerance = 4e-3 if dtype == torch.float16 else 2e-2
        assert loss == pytest.approx(expected.item(), rel=tolerance), (kernel, batch)
        assert (found - gradient).norm() / gradient.norm() < 10 * tolerance, (kernel, batch)


def loss_alone_on_gpu(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    with torch.device("cuda"):
        return loss_alone(model, row)


def test_the_chosen_kernel_is_the_fast_one(model_path: str) -> None:
    """On compute capability 8.0 and later, half precision goes through varlen_attn; nothing goes through cuDNN."""
    capability = torch.cuda.get_device_capability()
    config = small_model().config
    chosen = choose_attention(config, True, capability, True)
    assert chosen == ("repeated_rows" if capability < (8, 0) else "varlen" if torch_has_varlen() else "rows")
    inference.load_for_inference(ModelArguments(model_path=model_path), None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss_and_gradient(torch.float16, chosen, FlattenCollator())
    names = [event.key.lower() for event in profile.key_averages()]
    assert names and not any("cudnn" in name for name in names)


class WaitCounter(TrainerCallback):
    """Counts the waits of the host for the GPU in each step; the first steps compile and plan."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.messages = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        self.steps.append([f"{m.filename}:{m.lineno}" for m in self.messages if "synchroniz" in str(m.message)])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("precision", HALF)
def test_a_step_does_not_wait_for_the_gpu(precision: str, soft: bool, tmp_path: Path) -> None:
    """Apart from the one look of fp16's scaler at whether gradients overflowed."""
    dtype = HALF[precision]
    model = small_model().to("cuda", dtype)
    if soft:
        model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    else:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    half = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=12,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"non_blocking": True},
        **half,
    )
    counter = WaitCounter()
    make_trainer(model, 0, arguments, random_rows() * 6, callbacks=(counter,)).train()
    allowed = 1 if precision == "fp16" else 0
    assert all(len(step) <= allowed for step in counter.steps[4:]), counter.steps


# ---- answers


@pytest.mark.parametrize("soft", [False, True])
def test_batches_answer_as_single_rows(soft: bool) -> None:
    """In float32, token for token; label scores equal those of one prompt at a time."""
    model, tokenizer = small_model().cuda(), make_tokenizer()
    if soft:
        model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    set_prompt_format(tokenizer, "auto")
    prompts = [[*f"{'ab' * n} c{n}".encode()] for n in range(12)]
    config = make_generation_config(tokenizer, 24)
    alone = [generate(model, tokenizer, [prompt], config)[0].token_ids for prompt in prompts]
    assert [answer.token_ids for answer in generate(model, tokenizer, prompts, config)] == alone
    labels = [[*b"good"], [*b"bad"], [*b"neither"]]
    together = score_labels(model, prompts, labels, pad_token_id(tokenizer))
    single = torch.cat([score_labels(model, [prompt], labels, pad_token_id(tokenizer)) for prompt in prompts])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-4)


# ---- interruptions and memory


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resumed_run(run_main: Run, model_path: str, rows_path: str, tmp_path: Path, precision: str) -> None:
    """Fifteen steps and fifteen more are thirty: the same kernels on the same rows, so the same weights."""
    more = [*PRECISIONS[precision], "--save_steps", 15, "--keep_checkpoints", True]
    run_main(train_lora, *flags(model_path, rows_path, tmp_path / "whole", *more))
    run_main(train_lora, *flags(model_path, rows_path, tmp_path / "parts", *more))
    (tmp_path / "parts/adapter_model.safetensors").unlink()
    for path in sorted((tmp_path / "parts/checkpoint-30").iterdir()):
        path.unlink()
    (tmp_path / "parts/checkpoint-30").rmdir()
    more += ["--resume_from_checkpoint", True]
    run_main(train_lora, *flags(model_path, rows_path, tmp_path / "parts", *more))
    whole, parts = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "parts")
    difference = max((whole[name] - parts[name]).abs().max().item() for name in whole)
    print(f"{precision}: largest difference {difference:.1e}")
    assert difference < 1e-3


def test_out_of_memory(run_main: Run, rows_path: str, tmp_path: Path) -> None:
    """Real: more than the GPU may give; one message, and the flags to try."""
    model = make_model(hidden_size=1024, head_dim=64, intermediate_size=4096, vocab_size=100_000)
    path = save_checkpoint(tmp_path / "model", make_tokenizer(), model)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"instruction": "a", "output": "b " * 400}] * 64), encoding="utf-8")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * 2**30 / total)
    more = ["--per_device_train_batch_size", 64]
    message = run_main(train_lora, *flags(path, str(data), tmp_path / "out", *more), expected=1)
    assert "out of memory" in message and "--gradient_checkpointing True" in message


CAPS = [("lora_4bit", 12, []), ("prompt_tuning_4bit", 8, ["--gradient_checkpointing", "True"])]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gib", "more"), CAPS, ids=["LoRA in 12 GiB", "prompt tuning in 8 GiB"])
def test_caps_at_7b(method: str, gib: int, more: list[str], tmp_path: Path) -> None:
    """The promise that people compare: random weights of Qwen2.5-7B, one row of 1,024 tokens, all supervised."""
    words = f"--shape qwen2.5-7b --sequence_length 1024 --batch_size 1 --steps 3 --methods {method} --memory_cap {gib}"
    command = [sys.executable, "benchmark.py", *words.split(), "--output_dir", str(tmp_path), *more]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["results"][method]
    print(f"{method}: {figures['peak_gib']:.2f} GiB, {figures['tokens_per_second']:,.0f} tokens/s")
    assert figures["peak_gib"] <= gib
