"""merge_adapter.py: what is served answers as what was trained, on every architecture (traps 10, 24, 47, 56, 57)."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import (
    CHATML,
    ENDOFTEXT,
    IM_END,
    THINKERS,
    TOKENS,
    Run,
    make_model,
    make_tokenizer,
    push_down,
    save_base,
    save_checkpoint,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import inference
import merge_adapter
from common import load_model
from finetuning.cli.arguments import ModelArguments
from finetuning.generation.generate import encode_question
from finetuning.merging import checkpoint_copy, verification
from finetuning.merging.merge import soft_prompt_changes
from finetuning.merging.serving import soft_tokens
from finetuning.model import hub
from finetuning.model.folder import describe_adapter
from finetuning.model.soft_prompts import SoftPromptModel
from finetuning.preprocessing.summary import Summary
from finetuning.preprocessing.templates import is_thinking, prompt_format, set_prompt_format, set_thinking

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "MAX_NEW_TOKENS", 12)


@pytest.fixture
def merge(run_main: Run, rows_path: str, tmp_path: Path) -> Run:
    """Run the command on the adapter in tmp_path/adapter."""
    flags = ["--adapter_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    return partial(run_main, merge_adapter, *flags, "--check_data_path", rows_path)


def save_random_adapter(
    base: str,
    folder: Path,
    method: str,
    thinking: bool = False,
    count: int = TOKENS,
    in_4bit: bool = False,
    **lora: Any,
) -> None:
    """An adapter of random weights, with what training saves beside it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_prompt_format(tokenizer, "auto")
    set_thinking(tokenizer, thinking)
    model = load_model(ModelArguments(base, in_4bit), torch.float32, CPU)
    if method == "lora":
        options = {"target_modules": "all-linear", "lora_alpha": 16, "lora_dropout": 0.0} | lora
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    else:
        model = SoftPromptModel(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise + (parameter.data if "lora_" not in name or "magnitude" in name else 0)
    model.save_pretrained(folder)
    for name, text in describe_adapter(model, tokenizer, Summary("none"), {}, {}).items():
        (folder / name).write_text(text, encoding="utf-8")


def read_difference(printed: str) -> float:
    prompts, tokens, answers = map(
        int, re.search(r"prompts (\d), equal first tokens (\d), equal answers (\d)", printed).groups()
    )
    assert prompts == 8 and min(tokens, answers) >= 7, printed  # random weights have ties, which the command accepts
    return float(printed.split("largest logit difference ")[1].split(" ")[0])


KINDS = ["qwen2", "qwen3", "qwen3 tied", "qwen2_moe", "qwen3_moe", "qwen3_next", "whole", "wholeMoe"]


@pytest.mark.parametrize("method", ["lora", "soft prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_base_and_adapter(
    kind: str, method: str, merge: Run, run_main: Run, rows_path: str, tmp_path: Path
) -> None:
    """Traps 24, 47, 56: a checkpoint of the base's class with all of its tensors; those that the adapter does not reach
    equal it byte for byte. Its answers are the adapter's, also those of inference.py."""
    base = save_base(tmp_path / "base", kind)
    save_random_adapter(base, tmp_path / "adapter", method)
    assert read_difference(merge()) <= (1e-3 if method == "lora" else 1e-5)

    before, after = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert before.keys() <= after.keys() <= before.keys() | {"lm_head.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "lora":
        layers = {name.split("layers.")[1].split(".")[0] for name in changed}
        assert len(layers) == (2 if "next" not in kind and "whole" not in kind else 4)
        assert not any(part in name for part in ("embed", "visual", "mtp") for name in changed)
        assert any("experts.3.down_proj" in name for name in changed) == (kind in ("qwen3_moe", "qwen3_next"))
    else:
        assert len(changed - {"lm_head.weight"}) == 1 and all("visual" not in name for name in changed)
        assert ("lm_head.weight" in after) and AutoConfig.from_pretrained(
            tmp_path / "merged"
        ).tie_word_embeddings is False
    assert (
        json.loads((tmp_path / "merged/config.json").read_text("utf-8"))["architectures"]
        == json.loads((tmp_path / "base/config.json").read_text("utf-8"))["architectures"]
    )

    flags = ["--data_path", rows_path, "--max_new_tokens", 8]
    expected = run_main(inference, "--adapter_path", tmp_path / "adapter", *flags)
    assert run_main(inference, "--model_path", tmp_path / "merged", *flags) == expected
    assert len(set(expected.splitlines())) > 3


FORMATS = {"plain": None, "ChatML": CHATML} | THINKERS


@pytest.mark.parametrize("thinking", [False, True], ids=["answers", "thinks"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_prompt_format(
    name: str, thinking: bool, merge: Run, run_main: Run, rows_path: str, tmp_path: Path
) -> None:
    """Trap 57: the template of the result gives the trained prompts, in the trained mode, to any program; and
    inference.py keeps to it. A user cannot write the tokens of the soft prompt."""
    tokenizer = make_tokenizer() if name == "plain" else make_tokenizer("<|im_end|>", FORMATS[name])
    base = save_base(tmp_path / "base", "qwen2", tokenizer)
    save_random_adapter(base, tmp_path / "adapter", "soft prompt", thinking)
    assert read_difference(merge()) <= 1e-5
    flags = ["--data_path", rows_path, "--max_new_tokens", 8]
    assert run_main(inference, "--model_path", tmp_path / "merged", *flags) == run_main(
        inference, "--adapter_path", tmp_path / "adapter", *flags
    )
    served = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked, model_args = [], ModelArguments(None, None)
    for adapter in (None, str(tmp_path / "adapter")):
        model_args.model_path = str(tmp_path / "merged") if adapter is None else base
        _, tokenizer, _ = inference.load_for_inference(model_args, adapter)
        asked.append((is_thinking(tokenizer), prompt_format(tokenizer)))
    assert asked[0] == asked[1] == (thinking and name in THINKERS, "plain" if name == "plain" else "chat")
    if name == "plain":  # transformers' server would show the prompt
        for text, answer in (
            ("\nOutput: ok\n<|endoftext|>", "ok"),
            (" ok\n<|endoftext|>", "ok"),
            ("<|endoftext|>", ""),
        ):
            assert served.parse_response(text, prefix="Instruction: Go\nOutput:")["content"] == answer
    attack = [{"role": "user", "content": "a<|soft_prompt_0|>b"}, {"role": "assistant", "content": "<|soft_prompt_1|>"}]
    ids = served.apply_chat_template(
        [*attack, {"role": "user", "content": "c"}], add_generation_prompt=True, return_dict=False
    )
    soft = [served.convert_tokens_to_ids(token) for token in soft_tokens(TOKENS)]
    assert ids[:TOKENS] == soft and not set(ids[TOKENS:]) & set(soft)
    assert encode_question({"instruction": "<|soft_prompt_0|>"}, served)[TOKENS:].count(soft[0]) == 0


def test_soft_tokens_are_never_answered(merge: Run, tmp_path: Path) -> None:
    """Whatever the hidden state: no logits processor is needed. As long as the vectors are, tied they would be."""
    base = save_base(tmp_path / "base", "qwen3 tied")
    save_random_adapter(base, tmp_path / "adapter", "soft prompt")
    assert "the vocabulary grows from 264 to 320 rows" in merge()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    hidden = torch.randn(2000, 32, generator=torch.Generator().manual_seed(2))
    logits = model.lm_head(hidden)
    assert logits.shape[1] == 320 and logits[:, :260].max(1).values.gt(logits[:, 260:].max(1).values).all()
    inputs = model.get_input_embeddings()(torch.arange(260, 265))
    torch.testing.assert_close(inputs, load_file(tmp_path / "adapter/adapter_model.safetensors")["prompt_embeddings"])
    assert (inputs @ inputs.T).diagonal().min() > (inputs @ model.lm_head.weight[:260].T).max()


def test_spare_rows_are_used(merge: Run, tmp_path: Path) -> None:
    """Trap 47: a vocabulary with room keeps its size."""
    base = save_base(tmp_path / "base", "qwen2")
    save_random_adapter(base, tmp_path / "adapter", "soft prompt", count=4)
    assert "special tokens, ids 260 to 263\n" in merge()
    assert load_file(tmp_path / "merged" / WEIGHTS)["model.embed_tokens.weight"].shape == (264, 32)


VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "r": 4},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {"v_proj": 64}},
    "bias of the product": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "biases": {"bias": "all", "target_modules": ["o_proj"]},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output layer": {"target_modules": ["lm_head", "q_proj"]},
    "whole output layer": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "one expression": {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
}


@pytest.mark.parametrize(
    ("variant", "tied"),
    [(name, "") for name in VARIANTS] + [(name, " tied") for name in VARIANTS if "embed" in name or "output" in name],
)
def test_variants_of_lora(variant: str, tied: str, merge: Run, tmp_path: Path) -> None:
    """As PEFT computes them."""
    base = save_base(tmp_path / "base", "qwen2" + tied)
    save_random_adapter(base, tmp_path / "adapter", "lora", **VARIANTS[variant])
    assert read_difference(merge()) <= 1e-3


# ---- the folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def change_file(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(read(path) | fields), encoding="utf-8")


def test_files_beside_the_weights(merge: Run, tmp_path: Path) -> None:
    """Shards, index, configurations and preprocessor; both stop tokens; greedy, or the base's sampling if asked for."""
    base = tmp_path / "base"
    model = push_down(make_model("qwen2", tie_word_embeddings=True))
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    make_tokenizer("<|im_end|>").save_pretrained(base)
    model.save_pretrained(base, max_shard_size="60KB")
    added = {token.pop("id"): token for token in read(base / "tokenizer.json")["added_tokens"]}
    change_file(base / "tokenizer_config.json", chat_template="old", added_tokens_decoder=added)
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (base / "added_tokens.json").write_text("{}", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"of no use")
    save_random_adapter(str(base), tmp_path / "adapter", "soft prompt")
    assert "not copied, because the checkpoint does not load them: pytorch_model.bin" in merge()

    out = tmp_path / "merged"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1 and shards == sorted(path.name for path in out.glob("*.safetensors"))
    index = read(out / "model.safetensors.index.json")
    tensors = {name: load_file(out / shard) for name, shard in index["weight_map"].items()}
    assert all(name in tensors[name] for name in index["weight_map"]) and "lm_head.weight" in tensors
    assert index["metadata"]["total_size"] == sum(tensors[name][name].nbytes for name in tensors)
    assert {(out / shard).stat().st_mode for shard in shards} == {(out / "config.json").stat().st_mode}
    expected = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == expected | {"chat_template.jinja"}
    template = (out / "chat_template.jinja").read_text(encoding="utf-8")
    config = read(out / "tokenizer_config.json")
    assert config["chat_template"] == template and config["added_tokens_decoder"]["260"]["special"]
    assert read(out / "added_tokens.json") == {f"<|soft_prompt_{n}|>": 260 + n for n in range(TOKENS)}
    generation = read(out / "generation_config.json")
    assert generation["eos_token_id"] == [ENDOFTEXT, IM_END] and generation["pad_token_id"] == ENDOFTEXT
    assert generation["do_sample"] is False and not generation.keys() & {"temperature", "top_p", "repetition_penalty"}
    shutil.rmtree(out)
    merge("--keep_sampling", True)
    generation = read(out / "generation_config.json")
    assert generation["eos_token_id"] == [ENDOFTEXT, IM_END] and generation["do_sample"] is True
    assert (generation["temperature"], generation["repetition_penalty"]) == (0.7, 1.05)


@pytest.mark.parametrize("method", ["lora", "soft prompt"])
def test_half_precision(method: str, merge: Run, tmp_path: Path) -> None:
    """Merged in float32 and rounded once; what rounding gives is printed, and is not an error."""
    base = save_base(tmp_path / "base", "qwen2")
    save_random_adapter(base, tmp_path / "adapter", method)
    printed = merge("--dtype", "bfloat16")
    assert "compared with base and adapter, 8 rows: largest logit difference 0.0" in printed
    rounded = load_file(tmp_path / "merged" / WEIGHTS)
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert read(tmp_path / "merged/config.json")["dtype"] == "bfloat16"
    shutil.rmtree(tmp_path / "merged")
    merge()
    exact = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def test_trained_in_4_bits(merge: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 24: merged into the 16- or 32-bit base, and the difference to what was trained is told."""
    model = push_down(make_model("qwen2", hidden_size=64, head_dim=16))
    base = save_checkpoint(tmp_path / "base", make_tokenizer(), model)
    save_random_adapter(base, tmp_path / "adapter", "lora", in_4bit=True)
    printed = merge()
    differences = {
        line.split(", ")[0]: float(line.split("difference ")[1].split(" ")[0])
        for line in printed.splitlines()
        if line.startswith("compared")
    }
    assert differences["compared with base and adapter"] < 1e-3 < differences["compared with 4-bit base and adapter"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / WEIGHTS).values()} == {torch.float32}


def test_on_top_of_a_merged_checkpoint(merge: Run, run_main: Run, rows_path: str, tmp_path: Path) -> None:
    """LoRA, trained in the format of the soft prompt that the checkpoint holds; a second soft prompt is refused."""
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "first", "soft prompt")
    flags = ["--check_data_path", rows_path, "--adapter_path"]
    run_main(merge_adapter, "--output_dir", tmp_path / "one", *flags, tmp_path / "first")
    save_random_adapter(str(tmp_path / "one"), tmp_path / "adapter", "lora", target_modules=["q_proj", "v_proj"])
    assert read_difference(merge()) <= 1e-3
    template = (tmp_path / "merged/chat_template.jinja").read_text(encoding="utf-8")
    assert template == (tmp_path / "one/chat_template.jinja").read_text(encoding="utf-8")
    save_random_adapter(str(tmp_path / "one"), tmp_path / "second", "soft prompt")
    message = run_main(merge_adapter, "--output_dir", tmp_path / "two", *flags, tmp_path / "second", expected=2)
    assert "already holds a soft prompt" in message and not (tmp_path / "two.unverified").exists()


def test_the_tokenizer_of_an_adapter(merge: Run, tmp_path: Path) -> None:
    """Trap 90: it becomes that of the result."""
    base = save_base(tmp_path / "base", "qwen2")
    save_random_adapter(base, tmp_path / "adapter", "lora", target_modules=["q_proj", "v_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<happy>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_info.json").unlink()
    assert read_difference(merge("--prompt_format", "chat")) <= 1e-3
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged("<happy>").input_ids == [260] and prompt_format(merged) == "chat"


def test_names_without_prefix(merge: Run, tmp_path: Path) -> None:
    """Trap 103: a checkpoint of the bare decoder, which has no `model.` before its names."""
    base = save_base(tmp_path / "base", "qwen3 tied")
    weights = {name.removeprefix("model."): each for name, each in load_file(Path(base, "model.safetensors")).items()}
    save_file(weights, Path(base, "model.safetensors"), metadata={"format": "pt"})
    change_file(Path(base, "config.json"), architectures=["Qwen3Model"])
    save_random_adapter(base, tmp_path / "adapter", "lora")
    assert read_difference(merge("--output_dir", f"{tmp_path}/merged/")) <= 1e-3
    # vLLM would make embeddings with a bare decoder
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_experts_of_transformers_4(merge: Run, tmp_path: Path) -> None:
    """Trap 103: an adapter of each expert, of which PEFT makes one for all."""
    base = save_base(tmp_path / "base", "qwen3_moe")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(make_model("qwen3_moe"), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    state = {name: tensor + 0.1 for name, tensor in load_file(file).items()}
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    change_file(tmp_path / "adapter/adapter_config.json", target_modules=targets, base_model_name_or_path=base)
    for layer in range(2):
        for expert in range(4):
            for name, (size, out) in {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}.items():
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                state |= {f"{path}.lora_A.weight": torch.ones(8, size), f"{path}.lora_B.weight": torch.ones(out, 8)}
    save_file(state, file)
    assert read_difference(merge()) <= 1e-3


# ---- adapters for engines that load them


@pytest.mark.parametrize("kind", ["qwen2", "whole"])
def test_exported_adapter(kind: str, merge: Run, tmp_path: Path) -> None:
    """Trap 56: under the names of the checkpoint's own class, where it is compared."""
    base = save_base(tmp_path / "base", kind)
    save_random_adapter(base, tmp_path / "adapter", "lora", target_modules=["q_proj", "v_proj"])
    assert read_difference(merge("--export", "peft")) <= 1e-3
    names = load_file(tmp_path / "merged/adapter_model.safetensors")
    assert all((".language_model." in name) == (kind == "whole") for name in names)
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"adapter_config.json", "chat_template.jinja"}


# ---- GGUF and the hub

CONVERTER = """
import pathlib, sys
folder, _, file, _, kind = sys.argv[1:]
pathlib.Path(file).write_bytes(b"GGUF") if kind == "f32" else sys.exit("unknown tokenizer")
"""


def test_gguf(merge: Run, tmp_path: Path) -> None:
    """llama.cpp's converter is run; what it says is told if it fails, and the checkpoint stays."""
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "adapter", "soft prompt")
    flags = ["--gguf", True, "--llama_cpp", tmp_path]
    assert "no convert_hf_to_gguf.py" in merge(*flags, expected=2)
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER, encoding="utf-8")
    assert "model.gguf: 0.0 MB" in merge(*flags)
    modelfile = (tmp_path / "merged/Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """') and "PARAMETER stop <|im_end|>" in modelfile
    assert '<|soft_prompt_4|>" }}{{ end }}' in modelfile and "PARAMETER temperature 0" in modelfile
    shutil.rmtree(tmp_path / "merged")
    assert "unknown tokenizer" in merge(*flags, "--dtype", "bfloat16", expected=1)
    assert (tmp_path / "merged" / WEIGHTS).is_file() and not (tmp_path / "merged/model.gguf").exists()


def test_upload(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "adapter", "soft prompt")
    uploads = Mock()
    monkeypatch.setattr(hub, "create_repo", lambda name, **more: Mock(repo_id=name if "/" in name else f"me/{name}"))
    monkeypatch.setattr(hub, "upload_folder", uploads)
    assert "uploaded to me/merged" in merge("--push_to_hub", True)
    assert uploads.call_args.kwargs["folder_path"] == str(tmp_path / "merged")
    shutil.rmtree(tmp_path / "merged")
    uploads.side_effect = ConnectionError("no route")
    message = merge("--push_to_hub", True, "--hub_model_id", "you/it", expected=1)
    assert "no route" in message and f"hf upload you/it {tmp_path / 'merged'}" in message
    shutil.rmtree(tmp_path / "merged")
    monkeypatch.setattr(hub, "create_repo", Mock(side_effect=ValueError("log in first")))
    message = merge("--push_to_hub", True, expected=2)  # before anything is loaded
    assert "log in first" in message and not (tmp_path / "merged.unverified").exists()


# ---- what is refused


def test_a_result_that_answers_otherwise(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and the folder keeps a name that says so: no effect, other prompts, half of the effect."""
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "adapter", "lora")

    def breaks(name: str, replacement: Any, *flags: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(f"finetuning.merging.merge.{name}", replacement)
            message = merge(*flags, expected=1)
        assert f"keeps the name {tmp_path / 'merged.unverified'}" in message and not (tmp_path / "merged").exists()
        assert "is in the way" in merge(expected=2)
        shutil.rmtree(tmp_path / "merged.unverified")
        return message

    breaks("lora_changes", lambda *rest: {})
    breaks("serve_template", lambda template, *rest: template.replace("Instruction", "instruction"))
    save_random_adapter(str(tmp_path / "base"), tmp_path / "adapter", "lora", lora_alpha=0.5)  # lightly trained
    for dtype in ("float32", "float16", "bfloat16"):
        message = breaks("lora_changes", lambda *rest: {}, "--dtype", dtype)
        assert ("try --dtype float32" in message) == (dtype != "float32")
    save_random_adapter(str(tmp_path / "base"), tmp_path / "adapter", "soft prompt")
    breaks("soft_prompt_changes", lambda prompt, *rest: soft_prompt_changes(prompt / 2, *rest))


def test_a_light_adapter_wants_float32(merge: Run, tmp_path: Path) -> None:
    """Rounding to bfloat16 takes a large part of what it changes; the message names what keeps it."""
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "adapter", "lora", lora_alpha=0.02)
    assert "bfloat16 rounds away what this adapter changes: try --dtype float32" in merge(
        "--dtype", "bfloat16", expected=1
    )
    shutil.rmtree(tmp_path / "merged.unverified")
    assert read_difference(merge("--dtype", "float32")) < 1e-3


def test_mistakes(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two lines, exit code 2, and nothing written."""
    base = Path(save_base(tmp_path / "base", "qwen2"))
    save_random_adapter(str(base), tmp_path / "adapter", "lora")

    def refused(*flags: Any) -> str:
        message = merge(*flags, expected=2)
        assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.unverified").exists()
        return message

    other = save_checkpoint(tmp_path / "other", make_tokenizer(), make_model("qwen2", seed=1))
    assert "trained on another base model" in refused("--model_path", other)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine", encoding="utf-8")
    assert f"'{full}' already exists" in refused("--output_dir", full)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "already exists" in refused("--output_dir", tmp_path / "link")
    assert (full / "mine").read_text(encoding="utf-8") == "mine" and "already exists" in refused("--output_dir", other)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_copy.shutil, "disk_usage", lambda path: Mock(free=100_000))
        assert "the result needs 0 MB, and 0 MB are free" in refused()
    assert "cannot be downloaded" in refused("--model_path", "owner/name")
    assert "--check_rows 0" in refused("--check_rows", 0)
    assert "needs --llama_cpp" in refused("--gguf", True)
    assert "does not exist" in refused("--adapter_path", tmp_path / "none")
    assert "float64" in refused("--dtype", "float64")
    for method in ("fp8", "gptq", "bitsandbytes"):
        quantised = Path(shutil.copytree(base, tmp_path / method))
        change_file(quantised / "config.json", quantization_config={"quant_method": method})
        message = refused("--model_path", quantised)
        assert f"is quantised ({method})" in message and "16-bit checkpoint" in message
    whole = tmp_path / "adapter/adapter_config.json"
    before = whole.read_bytes()
    change_file(whole, trainable_token_indices=[1])
    assert "has trainable_token_indices, which cannot be merged" in refused()
    whole.write_bytes(before)
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:, :4].contiguous()}, tmp_path / "adapter/adapter_model.safetensors")
    assert "does not fit this base model" in refused()
    empty = {key: weight * ("lora_B" not in key) for key, weight in weights.items()}
    save_file(empty, tmp_path / "adapter/adapter_model.safetensors")
    assert "changes nothing" in refused() and "changes nothing" in refused("--export", "peft")
    huge = {key: weight * (1e6 if "layers.1" in key else 1) for key, weight in weights.items()}
    save_file(huge, tmp_path / "adapter/adapter_model.safetensors")
    assert "too large for float16; try --dtype bfloat16" in refused("--dtype", "float16")
    save_random_adapter(str(base), tmp_path / "soft", "soft prompt")
    flags = ["--adapter_path", tmp_path / "soft"]
    assert "no engine loads soft prompts" in refused(*flags, "--export", "peft")
    tokenizer = read(base / "tokenizer.json")["model"]
    (base / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    (base / "merges.txt").write_text("\n".join(map(" ".join, tokenizer["merges"])), encoding="utf-8")
    (base / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(*flags)


def test_full_disk_while_writing(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_adapter(save_base(tmp_path / "base", "qwen2"), tmp_path / "adapter", "lora")
    monkeypatch.setattr(checkpoint_copy, "save_file", Mock(side_effect=OSError(28, "No space left on device")))
    assert "cannot be written" in merge(expected=2)
    assert not (tmp_path / "merged.unverified").exists()
