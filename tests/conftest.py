"""Tiny checkpoints made in the test run: no download, no GPU.

The tokenizer is byte-level with one token for each byte and a single merge, of two newlines, so that ids can be written
down in a test: id of a byte = its value.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests say what happens without a GPU

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen2Tokenizer

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

NEWLINES, ENDOFTEXT, IM_START, IM_END = 256, 257, 258, 259

# Two templates as instruct models bring them: ChatML with a default system turn, and one that takes the empty thinking
# block out of earlier turns.
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
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        sizes |= {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if model_type in ("qwen3_next", "qwen3_5_text"):
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


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model: eos is <|endoftext|>."""
    return save_checkpoint(tmp_path_factory.mktemp("base"), make_tokenizer(), make_model())


@pytest.fixture(scope="session")
def instruct_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An instruct model: eos is <|im_end|>."""
    folder = tmp_path_factory.mktemp("instruct")
    return save_checkpoint(folder, make_tokenizer("<|im_end|>"), make_model())


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    words = ["sun", "rain", "wind", "snow", "fog", "hail", "ice", "heat", "dew", "mist", "storm", "cloud"]
    rows = [{"instruction": f"Say {word}", "input": "", "output": word * (1 + n % 3)} for n, word in enumerate(words)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a script's main with some flags; returns what it printed on stdout.

    With `expected`, the script must end with that exit code and one or two lines of error, which are returned.
    """

    def run(module: ModuleType, *flags: object, expected: int | None = None) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        if expected is None:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            module.main()
        message = capsys.readouterr().err
        assert stop.value.code == expected, message
        assert "Traceback" not in message
        errors = message[message.index("error: ") :].strip().splitlines()
        assert len(errors) <= 2, message
        return "\n".join(errors)

    return run
