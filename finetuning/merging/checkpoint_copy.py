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
from finetuning.model.folder import TEMPLATE
from finetuning.model.multimodal import MULTIMODAL_PREFIX, TEXT_PREFIX

UNVERIFIED = ".unverified"  # ending of a folder whose contents have not been compared with base and adapter
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
TOKENIZER = "tokenizer.json"
HEAD = "lm_head.weight"
ANSWERS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # endings of classes that answer
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")

Change = Callable[[torch.Tensor], torch.Tensor]  # from a tensor of the base to the merged one


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class Checkpoint:
    """The base model on disk: its folder and, for each tensor, the name of its file."""

    def __init__(self, model_path: str) -> None:
        """Open a folder, or download a checkpoint that is named as on the hub."""
        self.folder = Path(model_path)
        if not self.folder.is_dir():
            ignored = [f"*{ending}" for ending in WEIGHT_FILES[1:]]
            try:
                self.folder = Path(snapshot_download(model_path, ignore_patterns=ignored))
            except (OSError, ValueError, ImportError) as error:
                fail(f"the base model '{model_path}' is not here, and cannot be downloaded: {first_line(error)}")
        self.config = read_json(self.folder / "config.json")
        # transformers loads a single file even if there is an index too
        self.index = {} if (self.folder / SINGLE).is_file() else read_json(self.folder / INDEX)
        shards = set(self.index.get("weight_map", {"": SINGLE}).values())
        self.files: dict[str, str] = {}
        for shard in sorted(shards):
            with safe_open(self.folder / shard, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), shard)
        self.embedding = self.name_of("model.embed_tokens.weight")
        with safe_open(self.folder / self.files[self.embedding], "pt") as file:
            embedding = file.get_slice(self.embedding)
            self.vocab_size, self.hidden_size = embedding.get_shape()
            self.dtype = embedding[:1].dtype  # and so that of most of its weights

    def name_of(self, name: str) -> str:
        """The name here of a tensor of the text part, which may stand inside another, or alone."""
        names = name, name.removeprefix(TEXT_PREFIX), name.replace(TEXT_PREFIX, MULTIMODAL_PREFIX, 1)
        return next((each for each in names if each in self.files), names[-1])

    def size_in(self, dtype: torch.dtype) -> float:
        """About how many bytes a copy takes, with an output layer of its own, which a soft prompt may need."""
        weights = sum((self.folder / shard).stat().st_size for shard in set(self.files.values()))
        weights += self.vocab_size * self.hidden_size * self.dtype.itemsize
        return weights * dtype.itemsize / self.dtype.itemsize + sum(path.stat().st_size for path in self.other_files())

    def other_files(self) -> list[Path]:
        """What is copied as it is: configurations, tokenizer, preprocessor; no weights, no hidden files."""
        weights = (*WEIGHT_FILES, ".index.json")
        files = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        return [path for path in files if not path.name.endswith(weights) and not path.name.startswith(".")]

    def check_not_quantised(self) -> None:
        """Refuse weights that are in 4 or 8 bits on disk: what LoRA changes is finer than their steps."""
        for part in (self.config, self.config.get("text_config", {})):
            saved = part.get("quantization_config") or part.get("compression_config")
            if saved:
                fail(
                    f"'{self.folder}' is quantised ({saved.get('quant_method', 'compressed-tensors')}): nothing can be "
                    "merged into such weights;\nname the 16-bit checkpoint of the same model with --model_path"
                )


def check_output(output_dir: str, size: float) -> None:
    """Refuse an output folder that is in use, or a disk without room for a result of `size` bytes."""
    folder, unverified = Path(output_dir), Path(output_dir + UNVERIFIED)
    if folder.is_symlink() or folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"--output_dir '{folder}' already exists; name another folder, or remove it")
    if unverified.exists():
        fail(f"'{unverified}', of an earlier run, is in the way; remove it, or name another --output_dir")
    free = shutil.disk_usage(next(path for path in folder.absolute().parents if path.exists())).free
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


def copy_other_files(base: Checkpoint, output: Path) -> None:
    for path in base.other_files():
        shutil.copyfile(path, output / path.name)
    used = set(base.files.values())
    unused = [path.name for path in base.folder.iterdir() if path.suffix in WEIGHT_FILES and path.name not in used]
    if unused:
        say(f"not copied, because the checkpoint does not load them: {', '.join(sorted(unused))}")


def write_weights(
    base: Checkpoint, output: Path, changes: dict[str, Change], untied: bool, dtype: torch.dtype | None
) -> None:
    """Write the weights of a checkpoint, a file at a time, with some tensors changed.

    Args:
        changes: by the name of the tensor to be changed; refused if the new one is too large for its dtype.
        untied: whether the output layer shared the embedding's weights, and gets its own, made of these.
        dtype: of all floating-point tensors; None leaves each as it is.
    """
    places, size = {}, 0
    for shard in sorted(set(base.files.values())):
        tensors = {}
        with safe_open(base.folder / shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():
                if untied and name == HEAD:
                    continue  # some checkpoints hold it although it is not used
                old = file.get_tensor(name)
                wanted = dtype if dtype and old.is_floating_point() else old.dtype
                for target in (name, HEAD) if untied and name == base.embedding else (name,):
                    new = changes[target](old.to(wanted)) if target in changes else old
                    tensors[target] = new.to("cpu", wanted).contiguous()
                    changed = target in changes or wanted != old.dtype
                    if changed and not tensors[target].isfinite().all():
                        fail(f"{target} would be NaN, or too large for {str(wanted)[6:]}; try --dtype bfloat16")
        save_file(tensors, output / shard, metadata=metadata)
        shutil.copymode(output / "config.json", output / shard)  # safetensors gives only the owner access
        places |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if index := base.index:
        index["metadata"] = index.get("metadata", {}) | {"total_size": size}
        write_json(output / INDEX, index | {"weight_map": dict(sorted(places.items()))})


def write_config(
    base: Checkpoint, output: Path, untied: bool, vocab_size: int, dtype: torch.dtype | None, class_name: str
) -> None:
    """Write config.json, changed as the weights were by `write_weights`, with a class that answers."""
    if not (base.config.get("architectures") or [""])[0].endswith(ANSWERS):
        base.config["architectures"] = [class_name]  # that of a bare decoder, or none: engines would make embeddings
    for part in (base.config, base.config.get("text_config", {})):  # a multimodal class has both
        if untied:
            part["tie_word_embeddings"] = False
        if vocab_size != base.vocab_size and "vocab_size" in part:
            part["vocab_size"] = vocab_size
        for name in ("dtype", "torch_dtype"):
            if dtype and name in part:
                part[name] = str(dtype).removeprefix("torch.")
    write_json(output / "config.json", base.config)


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
