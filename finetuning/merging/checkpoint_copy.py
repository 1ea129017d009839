"""A copy of a base checkpoint on disk in which some tensors, the prompt format and the tokenizer are changed.

Weights are read and written one file at a time. What is not changed stays as it is, byte for byte: also the tensors
that transformers leaves out when it loads the text part of a model, such as `mtp.*` and `visual.*`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetuning.cli.console import fail, first_line, is_disk_error, say

UNVERIFIED = ".unverified"  # ending of a folder whose contents have not been compared with base and adapter
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# From a tensor of the base to what takes its place: a tensor of the same name, or several by name.
Change = Callable[[torch.Tensor], torch.Tensor | dict[str, torch.Tensor]]


def find_folder(model_path: str) -> Path:
    """The folder of a checkpoint; one that is named as on the hub is in the cache since it was loaded."""
    if Path(model_path).is_dir():
        return Path(model_path)
    return Path(snapshot_download(model_path, ignore_patterns=[f"*{ending}" for ending in WEIGHT_FILES[1:]]))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def find_tensors(folder: Path) -> dict[str, str]:
    """The weights of a checkpoint: for each tensor the name of its file."""
    files = set(read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else {SINGLE}
    tensors = {}
    for name in sorted(files):
        with safe_open(folder / name, "pt") as file:
            tensors |= dict.fromkeys(file.keys(), name)
    return tensors


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's embedding, and so of most of its weights."""
    tensors = find_tensors(folder)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    with safe_open(folder / tensors[name], "pt") as file:
        return file.get_slice(name)[:1].dtype


def check_not_quantised(folder: Path) -> None:
    """Refuse a base whose weights are in 4 or 8 bits on disk: what LoRA changes is finer than their steps."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config", {})):
        saved = part.get("quantization_config") or part.get("compression_config")
        if saved:
            fail(
                f"'{folder}' is quantised ({saved.get('quant_method', 'compressed-tensors')}): nothing can be merged "
                "into such weights;\nname the 16-bit checkpoint of the same model with --model_path"
            )


def check_output(output_dir: str, size: int) -> None:
    """Refuse an output folder that is in use, or a disk without room for a result of `size` bytes."""
    folder, unverified = Path(output_dir), Path(output_dir + UNVERIFIED)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"--output_dir '{folder}' already exists; name another folder, or remove it")
    if unverified.exists():
        fail(f"'{unverified}', of an earlier run, is in the way; remove it, or name another --output_dir")
    place = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        fail(f"--output_dir '{folder}': the result needs {size / 2**20:,.0f} MB, and {free / 2**20:,.0f} MB are free")


@contextmanager
def unverified_folder(output_dir: str) -> Iterator[Path]:
    """A folder to write into, which bears another name until it is verified; removed if the writing fails."""
    folder = Path(output_dir + UNVERIFIED)
    try:
        folder.mkdir(parents=True)
        yield folder
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_disk_error(error):
            raise
        fail(f"--output_dir '{output_dir}' cannot be written: {first_line(error)}; nothing is left there")
    except BaseException:  # also Ctrl-C
        shutil.rmtree(folder)
        raise


def give_name(unverified: Path, output_dir: str) -> None:
    """Give a verified folder its own name."""
    if Path(output_dir).is_dir():
        Path(output_dir).rmdir()  # it was empty: Windows replaces no folder
    os.replace(unverified, output_dir)


def result_size(folder: Path, dtype: torch.dtype) -> int:
    """About how many bytes a copy of a checkpoint takes, with an output layer of its own."""
    size = 0
    for name in set(find_tensors(folder).values()):
        with safe_open(folder / name, "pt") as file:
            for tensor in file.keys():
                part = file.get_slice(tensor)
                numbers = torch.Size(part.get_shape()).numel()
                # a soft prompt may need an output layer, which is as large as the embedding
                size += numbers * dtype.itemsize * (2 if tensor.endswith("embed_tokens.weight") else 1)
    return size + sum(path.stat().st_size for path in folder.iterdir() if is_other_file(path))


def is_other_file(path: Path) -> bool:
    """Whether a file is copied as it is: configurations, tokenizer, preprocessor; no weights, no hidden files."""
    weights = path.suffix in WEIGHT_FILES or path.name.endswith(".index.json")
    return path.is_file() and not weights and not path.name.startswith(".")


def copy_other_files(folder: Path, output: Path) -> None:
    for path in sorted(folder.iterdir()):
        if is_other_file(path):
            shutil.copyfile(path, output / path.name)
    used = {*find_tensors(folder).values()}
    left_out = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_FILES and path.name not in used)
    if left_out:
        say(f"not copied, because the checkpoint does not load them: {', '.join(left_out)}")


def write_weights(folder: Path, output: Path, changes: dict[str, Change], dtype: torch.dtype | None) -> None:
    """Write the weights of a checkpoint, a file at a time, with some tensors changed.

    Args:
        changes: by the name of the tensor to be changed; refused if the new one is too large for its dtype.
        dtype: of all floating-point tensors; None leaves each as it is.
    """
    places, size = {}, 0
    for shard in sorted(set(find_tensors(folder).values())):
        tensors = {}
        with safe_open(folder / shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():
                old = file.get_tensor(name)
                wanted = dtype if dtype and old.is_floating_point() else old.dtype
                new = changes[name](old.to(wanted)) if name in changes else old
                new = new if isinstance(new, dict) else {name: new}
                tensors |= {key: tensor.to("cpu", wanted).contiguous() for key, tensor in new.items()}
                if (name in changes or wanted != old.dtype) and not all(tensors[key].isfinite().all() for key in new):
                    fail(f"{name} would be NaN, or too large for {str(wanted)[6:]}; try --dtype bfloat16")
        save_file(tensors, output / shard, metadata=metadata)
        shutil.copymode(output / "config.json", output / shard)  # safetensors gives only the owner access
        places |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index["metadata"] = index.get("metadata", {}) | {"total_size": size}
        write_json(output / INDEX, index | {"weight_map": dict(sorted(places.items()))})


def write_config(output: Path, untied: bool, vocab_size: int | None, dtype: torch.dtype | None) -> None:
    """Change config.json where the weights were changed.

    Args:
        untied: whether the output layer now has weights of its own.
        vocab_size: the rows of the embedding, if there are more.
        dtype: of the weights, if they have another.
    """
    config = read_json(output / "config.json")
    for part in (config, config.get("text_config", {})):  # a class with vision has both
        if untied:
            part["tie_word_embeddings"] = False
        if vocab_size and "vocab_size" in part:
            part["vocab_size"] = vocab_size
        for name in ("dtype", "torch_dtype"):
            if dtype and name in part:
                part[name] = str(dtype).removeprefix("torch.")
    write_json(output / "config.json", config)


def write_generation_config(output: Path, stop_ids: list[int], pad_id: int, sampling: bool) -> None:
    """Write what every engine reads: both stop tokens, and greedy answers or the sampling of the base model."""
    config = read_json(output / "generation_config.json")
    if not sampling:
        config = {name: value for name, value in config.items() if name not in SAMPLING} | {"do_sample": False}
    write_json(output / "generation_config.json", config | {"eos_token_id": stop_ids, "pad_token_id": pad_id})


def write_template(output: Path, template: str, response: dict[str, Any] | None) -> None:
    """Put a chat template wherever a program may look for it and, if there is a `response`, transformers'
    `response_template`, which says how an answer is read."""
    (output / TEMPLATE).write_text(template, encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        content = read_json(output / name)
        if "chat_template" in content:
            write_json(output / name, content | {"chat_template": template})
    if response:
        name = output / "tokenizer_config.json"
        write_json(name, read_json(name) | {"response_template": response})


def add_tokens(output: Path, tokens: dict[str, int]) -> None:
    """Add special tokens with their ids to the files of a tokenizer."""
    content = read_json(output / TOKENIZER)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": number, "content": token} | flags for token, number in tokens.items()]
    write_json(output / TOKENIZER, content)
    config = read_json(output / "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # as transformers 4 wrote it
        config["added_tokens_decoder"] |= {str(number): {"content": token} | flags for token, number in tokens.items()}
        write_json(output / "tokenizer_config.json", config)
    if (output / "added_tokens.json").is_file():
        write_json(output / "added_tokens.json", read_json(output / "added_tokens.json") | tokens)
