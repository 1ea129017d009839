"""What several tests share: tiny models, a tokenizer, rows, and runs to compare. No download, no GPU.

The tokenizer is byte-level, with one token for each byte and a single merge, of two newlines, so that a test can spell
out token ids: the id of a byte is its value.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModelForCausalLM, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Tokenizer,
)

from common import load_data, preprocess_function
from finetuning.cli import console
from finetuning.generation import evaluate
from finetuning.generation.generate import make_generation_config
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.dataset import Data
from finetuning.preprocessing.encode import IGNORE_INDEX
from finetuning.preprocessing.files import DataError, find_files
from finetuning.preprocessing.flags import DataArguments
from finetuning.preprocessing.rows import read_rows
from finetuning.training.callbacks import StopOnSignal

Run = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TOKENS = 5  # of a soft prompt
FLAT = ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"]  # families that may be flattened
HYBRID = ["qwen3_next", "qwen3_5_text"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
EXPERTS |= {"shared_expert_intermediate_size": 16, "mlp_only_layers": []}  # of each layer

NEWLINES, ENDOFTEXT, IM_START, IM_END = 256, 257, 258, 259

# Two templates like those of instruct models: ChatML with a default system turn, and one that removes the empty
# thinking block from earlier turns.
CHATML = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)

# What released templates do with reasoning: one with a switch, which is on (Qwen3); one that begins it in the
# prompt and trims answers (Qwen3.5); one without a switch (Qwen3-Thinking); one that forgets it (QwQ).
TURN = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
THOUGHT = (
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
)
END = "<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n"
OFF = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
THINKERS = {
    "switch": TURN + THOUGHT + "{{- m.content + '" + END + "' }}" + OFF + "{%- endif %}{%- endif %}",
    "opens": TURN
    + THOUGHT
    + "{{- m.content|trim + '"
    + END
    + "' }}"
    + OFF
    + "{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}",
    "always": TURN + THOUGHT + "{{- m.content + '" + END + "<think>\\n' }}{%- endif %}",
    "forgets": TURN + "{{- m.content + '" + END + "<think>\\n' }}{%- endif %}",
}


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in table)})
    return table


def make_tokenizer(eos_token: str = "<|endoftext|>", chat_template: str = CHATML) -> Qwen2Tokenizer:
    table = bytes_to_unicode()
    newline = table[ord("\n")]
    vocab = {table[byte]: byte for byte in range(256)} | {newline * 2: NEWLINES, "<|endoftext|>": ENDOFTEXT}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[(newline, newline)],
        unk_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = eos_token
    tokenizer.chat_template = chat_template
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [257, 258, 259]
    return tokenizer


def make_model(model_type: str = "qwen2", seed: int = 0, **changes: object) -> torch.nn.Module:
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": ENDOFTEXT,
        "pad_token_id": ENDOFTEXT,
    }
    if "moe" in model_type:
        sizes |= EXPERTS
    if model_type in (*HYBRID, "qwen3_5_moe_text"):
        sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_hidden_layers": 4}
        sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        sizes |= {"mlp_only_layers": [0, 1, 2, 3]} if model_type == "qwen3_next" else {}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))
    for parameter in model.parameters():  # larger than the usual 0.02, so that positions and contexts matter
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = GenerationConfig(eos_token_id=ENDOFTEXT, pad_token_id=ENDOFTEXT, do_sample=False)
    return model.eval()


def save_checkpoint(folder: Path, tokenizer: Qwen2Tokenizer, model: torch.nn.Module) -> str:
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def push_down(model: torch.nn.Module) -> torch.nn.Module:
    """As pretraining does, make the ids without a token improbable."""
    head = model.get_output_embeddings().weight.data
    head[len(make_tokenizer()) :] = head[: len(make_tokenizer())].mean(dim=0)
    return model


def save_whole(folder: Path, moe: str, tokenizer: Qwen2Tokenizer, **changes: object) -> str:
    """A checkpoint as released since Qwen3.5: text, vision, and `mtp` weights that transformers leaves out."""
    text = make_model("qwen3_5_text", **changes).config.to_dict() | (EXPERTS if moe else {})
    text |= {"model_type": f"qwen3_5{'_moe' if moe else ''}_text"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16}
    vision |= {"out_hidden_size": text["hidden_size"]}
    torch.manual_seed(0)
    config = getattr(transformers, f"Qwen3_5{moe}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"Qwen3_5{moe}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(folder, tokenizer, push_down(model))
    mtp = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.self_attn.q_proj.weight": torch.randn(64, 32)}
    file = folder / "model.safetensors"
    save_file(load_file(file) | mtp, file, metadata={"format": "pt"})
    return str(folder)


def save_base(folder: Path, kind: str, tokenizer: Qwen2Tokenizer | None = None, **changes: object) -> str:
    """A checkpoint of random weights; `kind` is a model type, or a class with vision: "whole" or "wholeMoe"."""
    tokenizer = tokenizer or make_tokenizer()
    if kind.startswith("whole"):
        return save_whole(folder, kind.removeprefix("whole"), tokenizer, **changes)
    model_type, _, tied = kind.partition(" ")
    if model_type == "qwen3_next":  # with experts, as released, but not with 512 of them in each layer
        changes |= EXPERTS
    model = make_model(model_type, tie_word_embeddings=bool(tied), **changes)
    return save_checkpoint(folder, tokenizer, push_down(model))


def make_soft(model_type: str = "qwen2", cls: type = SoftPromptModel) -> PeftModelForCausalLM:
    """A model with a random soft prompt; `cls` may be PEFT's own."""
    model = cls(make_model(model_type), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    generator = torch.Generator().manual_seed(3)
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def preprocess_row(row: dict[str, Any], tokenizer: Qwen2Tokenizer, max_length: int) -> dict[str, list[int]]:
    (example,) = preprocess_function(row, tokenizer)
    return {name: ids[:max_length] for name, ids in example.items()}


def preprocess(path: str, tokenizer: Qwen2Tokenizer, max_length: int, thinking: str = "auto", **options: Any) -> Data:
    """Data files as a run reads them."""
    data = DataArguments(data_path=path, max_length=max_length, thinking=thinking, **options)
    return load_data(
        SimpleNamespace(data=data, training=SimpleNamespace(seed=42, dataloader_drop_last=False)), tokenizer
    )[0]


def read_all(path: str, rename: dict[str, str] | None = None, output_required: bool = True) -> list[dict[str, Any]]:
    """The rows of data files, as they are trained on; or the end of the program, as for a run."""
    try:
        return [row for _, row, _ in read_rows(path, find_files(path), rename or {}, output_required)]
    except DataError as error:
        console.fail(str(error))


def make_rows(lengths: tuple[int, ...] = (9, 3, 14, 6), seed: int = 1) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        prompt = length // 2
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "length": length})
    return rows


def loss_alone(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    """The summed loss of one row, by the stock forward: no collator of ours, all logits, shifted labels."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")


def six_steps(base_path: str, rows_path: str, folder: Path) -> list[str]:
    """The flags of a short run."""
    return (
        f"--model_path {base_path} --data_path {rows_path} --output_dir {folder} "
        "--per_device_train_batch_size 4 --max_steps 6 --disable_tqdm True"
    ).split()


def call_main(script: ModuleType, flags: list[Any]) -> tuple[int, str]:
    """Call a script's main; returns its exit code, and what it printed on stdout and stderr."""
    printed, code = io.StringIO(), 0
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            script.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return code, printed.getvalue()


SHORT = 16  # tokens of an answer


def shorten_answers(patch: pytest.MonkeyPatch) -> None:
    """Cut the answers at the end of a run: random weights never end one by themselves."""

    def short(tokenizer: Qwen2Tokenizer, **limit: int) -> GenerationConfig:
        return make_generation_config(tokenizer, SHORT)

    patch.setattr(evaluate, "make_generation_config", short)


class StopAt(StopOnSignal):
    """Stands for a power cut at the beginning of a step. Put it in place of `common.StopOnSignal`."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal_weights(first: Path, second: Path) -> bool:
    one, other = adapter_weights(first), adapter_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Force(LogitsProcessor):
    """Makes the model say some tokens in turn."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:] = -torch.inf
        scores[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return scores


def force(model: torch.nn.Module, start: int, tokens: list[int]) -> None:
    original = model.generate
    model.generate = lambda **kwargs: original(
        **kwargs | {"logits_processor": LogitsProcessorList([Force(start, tokens)])}
    )


def launch(*commands: tuple[str, ...]) -> str:
    """Two processes run the commands of tests/ranks.py; returns what they printed."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess.run(
        [*TORCHRUN, str(REPOSITORY / "tests/ranks.py"), words],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# A line of a run's log: its step, epoch and loss, and what follows on it.
STEP = re.compile(r"^ +[\d,]+ +\d+\.\d\d +([\d.]+|nan|inf) +[\d.ni]", re.MULTILINE)


def read_or_refuse(read: Callable[[str], Any], path: Path) -> Any:
    """What `read` makes of a file; None if it ends with one short message that names the file."""
    errors: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "announce", errors.append)
        try:
            return read(str(path))
        except SystemExit as stop:
            assert stop.code == 2 and len(errors) == 1 and str(path) in errors[0]
            assert len(errors[0].splitlines()) <= 2 and len(errors[0]) < 1000, errors[0]
            return None


def damaged(data: bytes, damage: str, place: float, junk: bytes) -> bytes:
    """A file's bytes, changed in one of several ways at a place between 0 and 1."""
    at = int(place * len(data))
    return {
        "none": data,
        "cut": data[:at],
        "remove": data[:at] + data[at + 1 :],
        "double": data[:at] + data[at : at + 1] + data[at:],
        "flip": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :],
        "insert": data[:at] + junk + data[at:],
        "append": data + junk,
        "swap": data[at:] + data[:at],
    }[damage]


def logged(folder: Path, name: str = "loss") -> list[float]:
    """The losses of a run, as its last checkpoint has them."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[name] for entry in history if name in entry]


def difference(first: Path, second: Path) -> float:
    """The largest difference of two adapters in a weight."""
    one, other = adapter_weights(first), adapter_weights(second)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
