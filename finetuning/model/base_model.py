"""The base model on disk: what is checked before it is loaded, and what is said if it does not load."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from finetuning.cli.console import fail, first_line, say, warn
from finetuning.model.fingerprint import quantization
from finetuning.model.multimodal import is_multimodal

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "qwen.tiktoken")
# The JSON files that transformers reads.
READ = re.compile(r"config\.json$|index\.json$|^(tokenizer|vocab|special_tokens_map|added_tokens|chat_template)\.json$")
MAX_NAMES = 3  # of weights, in a message


def check_model_path(model_path: str, source: str = "--model_path") -> None:
    """Refuse what is not a complete checkpoint, before transformers opens it or looks for it on the hub.

    The message says what the path is and what to do; `source` is where it comes from.
    """
    path = Path(model_path)
    if path.is_dir():
        problem = find_problem(path)
        if problem:
            fail(f"{source}, '{model_path}', {problem}")
    elif not is_hub_name(model_path):
        kind = "is a file" if path.is_file() else "does not exist"
        remedy = "name the folder of a Qwen with --model_path, or a hub name such as Qwen/Qwen2.5-7B-Instruct"
        if path.suffix == ".gguf":
            kind = "is a GGUF file, made for llama.cpp"
        elif url := re.match(r"https?://[\w.-]+/([\w.-]+/[\w.-]+)", model_path):
            remedy = f"write --model_path {url[1]}"
        elif model_path.startswith("~"):
            remedy = f"the shell replaces ~ only outside quotes: write --model_path {path.expanduser()}"
        fail(f"{source}, '{model_path}', {kind}; {remedy}")


def is_hub_name(name: str) -> bool:
    """Whether a name that is no folder may be one on the hub: owner/name, in no folder that is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name.split("/")[0]).exists()


def newest_folder(folder: Path, name: str) -> Path | None:
    """The subfolder in which a file of this name was written last, such as a snapshot in the cache of the hub.

    Three levels are searched: a mistyped path may be a whole disk.
    """
    files = [path for depth in (1, 2, 3) for path in folder.glob("*/" * depth + name)]
    return max(files, key=lambda path: path.stat().st_mtime).parent if files else None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def find_problem(folder: Path) -> str | None:
    """Why a folder is not a checkpoint that can be loaded, and the remedy; None if nothing is wrong."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return (
                "is an adapter, not a base model; name its base model here (inference.py --adapter_path takes adapters)"
            )
        inside = newest_folder(folder, "config.json")
        hint = f"; perhaps you mean '{inside}'" if inside else ""
        return f"has no config.json: it is not a checkpoint that transformers can load{hint}"
    if not has_tokenizer(folder):
        return f"has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); download those files too"
    for file in sorted(file for file in folder.glob("*.json") if READ.search(file.name) and file.is_file()):
        try:
            if not isinstance(json.loads(file.read_bytes()), dict):
                return f"has a {file.name} that holds no JSON object; download it again"
        except ValueError:
            return describe_broken(file)
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json") if not (folder / "model.safetensors").is_file() else ():
        content = json.loads(index.read_bytes())
        if not content.keys() >= {"metadata", "weight_map"}:
            return describe_broken(index)
        files |= {folder / name for name in content["weight_map"].values()}
    if not files:
        kind = "only pickled weights (.bin), which can run code" if any(folder.glob("*.bin")) else "no weights"
        return f"has {kind}; download its .safetensors files, or convert it with save_pretrained"
    for file in sorted(files):
        if not file.is_file():
            return f"lacks {file.name}, which its index names; download it again"
        try:
            with safe_open(file, "pt"):  # compares the header with the file's size
                pass
        except SafetensorError:
            return describe_broken(file)
    return None


def describe_broken(file: Path) -> str:
    with file.open("rb") as content:
        pointer = content.read(64).startswith(b"version https://git-lfs")
    what = "only a Git LFS pointer" if pointer else f"not complete ({file.stat().st_size:,} bytes)"
    return f"has a {file.name} that is {what}; download it again" + (", with git lfs pull" if pointer else "")


def quantization_options(
    config: PreTrainedConfig, load_in_4bit: bool, dtype: torch.dtype, sharded: bool = False
) -> dict[str, Any]:
    """What `from_pretrained` has to be told of quantisation: nothing, unless asked for 4 bits or given FP8 weights.

    Even `quantization_config=None` would make it ignore how a checkpoint is quantised on disk, and read FP8 weights
    without their scales.

    Args:
        config: of the base model.
        dtype: of the matrix products.
        sharded: whether FSDP or ZeRO-3 will shard the weights: they shard floating-point numbers only, so the 4-bit
            numbers are stored as such, of the same dtype as the rest.
    """
    saved = getattr(config, "quantization_config", None)  # only quantised checkpoints have one
    method = saved["quant_method"] if isinstance(saved, dict) else getattr(saved, "quant_method", None)
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}  # FP8 kernels have no backward pass
    if load_in_4bit and method not in (None, "bitsandbytes"):
        fail(f"--load_in_4bit True: the checkpoint is already quantised ({method}); leave the flag out")
    if not load_in_4bit or method:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
    )
    return {"quantization_config": config}


def checkpoint_dtype(model_path: str) -> str | None:
    """The dtype that a checkpoint's config.json names, such as "bfloat16"; None if there is none to be read."""
    return read_config(model_path, "dtype") or read_config(model_path, "torch_dtype")


def read_config(model_path: str, name: str) -> Any:
    """A field of a checkpoint's config.json, or of the part that is its text model's; None if there is none."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(model_path)
    except (OSError, ValueError, ImportError):
        return None  # loading the model will say what is wrong
    return config.get("text_config", {}).get(name) or config.get(name)


def four_bit_flag(config: PreTrainedConfig, load_in_4bit: bool) -> list[str]:
    """The flag for base weights in 4 bits; none if they are, or if the checkpoint brings a quantisation of its own."""
    return [] if load_in_4bit or getattr(config, "quantization_config", None) else ["--load_in_4bit True"]


def explain_loading_error(error: Exception) -> str:
    """One line for a checkpoint that transformers refuses."""
    message = str(error)
    if "trust_remote_code" in message:
        return "it comes with its own Python code; if you trust its author, add --trust_remote_code True to run it"
    if "Unrecognized configuration class" in message:
        return "it is not a language model (a vision or audio model?); name a text model, such as Qwen3"
    return first_line(error)


def read_tokenizer(folder: str, trust_remote_code: bool, source: str = "--model_path") -> PreTrainedTokenizerBase:
    """The tokenizer of a base model or of an adapter, in a folder or on the hub."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a SOCKS proxy without its package, for one, or a field of another type
        fail(f"{source} '{folder}': the tokenizer cannot be loaded: {explain_loading_error(error)}")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_path: str) -> None:
    """Refuse a tokenizer with ids for which the model has no embedding."""
    largest, rows = max(tokenizer.get_vocab().values()), read_config(model_path, "vocab_size")
    if rows and largest >= rows:
        fail(
            f"'{tokenizer.name_or_path}': the tokenizer has ids up to {largest:,}, and the model in '{model_path}' has "
            f"embeddings for {rows:,};\nthey do not belong together: download both again"
        )


@contextmanager
def loading_report() -> Iterator[None]:
    """Inside the context, what transformers logs becomes part of an error, and is printed only if there is none.

    An error in quantisation, such as a lack of memory, is named nowhere but in the log.
    """
    text = StringIO()
    handler = logging.StreamHandler(text)
    transformers_logging.disable_default_handler()
    transformers_logging.add_handler(handler)
    try:
        yield
        print(text.getvalue(), end="", file=sys.stderr)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{text.getvalue()}") from error
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.enable_default_handler()


def check_loaded_weights(
    model_path: str, config: PreTrainedConfig, model: PreTrainedModel, loading_info: dict[str, Any]
) -> None:
    """Refuse weights that only the model or only the checkpoint has: transformers makes up the missing ones.

    Prints which class the model is of if the checkpoint is of another, and the share of its weights in 4 bits.
    """
    kinds = {
        "missing": "lacks weights of the model",
        "unexpected": "has weights that the model lacks",
        "mismatched": "has weights of other shapes than the model",
    }
    for kind, meaning in kinds.items():
        names = sorted(key if isinstance(key, str) else key[0] for key in loading_info[f"{kind}_keys"])
        if names:
            more = ", ..." if len(names) > MAX_NAMES else ""
            fail(
                f"--model_path '{model_path}' {meaning}: {', '.join(names[:MAX_NAMES])}{more} ({len(names)} in all).\n"
                "The checkpoint and its config.json do not belong together, or its files are not all there"
            )
    if is_multimodal(config.architectures):
        stored, loaded = config.architectures[0], type(model).__name__
        say(f"of {stored} only the text part is loaded: adapters fit {loaded}, and have no effect on {stored}")
    check_fp8_blocks(model_path, config, model)
    if quantization(model):
        print_share_in_4bit(model)


def check_fp8_blocks(model_path: str, config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Refuse FP8 weights with blocks of unequal sizes: transformers 5.23 gives them the scales of other blocks.

    It takes 192 rows with two scales for blocks of 96 rows each, though they are 128 and 64.
    """
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved["quant_method"] != "fp8" or not saved.get("weight_block_size"):
        return
    left = tuple(saved.get("modules_to_not_convert") or ()) + ("lm_head",)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in left):
            for size, block in zip(module.weight.shape, saved["weight_block_size"], strict=True):
                if size > block and size % block:
                    fail(
                        f"--model_path '{model_path}': {name} cannot be read from FP8: its {size} rows or columns are "
                        f"no multiple of {block};\nname the same model in 16 bits"
                    )


def print_share_in_4bit(model: PreTrainedModel) -> None:
    """Print how much of the model is in 4 bits, and warn if that is less than half, as with MoE experts."""
    vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        if id(parameter) not in vocabulary:
            in_4bit = isinstance(parameter, Params4bit)
            sizes[in_4bit] += 2 * parameter.nbytes if in_4bit else parameter.numel()  # a byte holds two weights
    share = 100 * sizes[True] / sum(sizes.values())
    say(f"4-bit weights: {share:.1f}% of the model without its vocabulary")
    if share < 50:
        warn(
            "most weights stay in 16 or 32 bits: bitsandbytes quantises linear layers only, and not the experts of a "
            "mixture-of-experts model"
        )
