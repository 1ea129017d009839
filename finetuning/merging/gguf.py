"""A merged checkpoint as one GGUF file, made by llama.cpp's own converter."""

import subprocess
import sys
from pathlib import Path

import torch

from finetuning.cli.console import fail, say, warn

CONVERTER, GGUF = "convert_hf_to_gguf.py", "model.gguf"
OUTPUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def find_converter(llama_cpp: str) -> Path:
    """The converter in a folder of llama.cpp's source."""
    converter = Path(llama_cpp, CONVERTER)
    if not converter.is_file():
        fail(f"--llama_cpp '{llama_cpp}' holds no {CONVERTER}; name the folder of llama.cpp's source")
    return converter


def write_gguf(converter: Path, folder: str, dtype: torch.dtype, modelfile: str | None) -> None:
    """Write the GGUF file into the folder of the checkpoint, which stays if the converter fails, and a Modelfile for
    Ollama beside it, if there can be one."""
    file = Path(folder, GGUF)
    command = [sys.executable, str(converter), folder, "--outfile", str(file), "--outtype", OUTPUT_TYPES[dtype]]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        file.unlink(missing_ok=True)
        reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        fail(
            f"{CONVERTER} failed: {reason}\n"
            f"The checkpoint in {folder} is whole; the converter needs: pip install gguf sentencepiece",
            1,
        )
    say(f"{file}: {file.stat().st_size / 2**20:,.1f} MB")
    if modelfile is None:
        warn("no Modelfile: the chat template has rules that Ollama's template language cannot express")
    else:
        Path(folder, "Modelfile").write_text(modelfile, encoding="utf-8")
