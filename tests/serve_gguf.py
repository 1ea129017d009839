"""Ask merged checkpoints in llama.cpp, and compare the answers with those of inference.py.

    python tests/serve_gguf.py path/to/llama.cpp

Trains models/tiny-qwen with both methods, merges, converts, and asks each row of data/test.json twice: as a completion
of the rendered prompt, and as a chat in the template that the GGUF file holds. It is skipped without llama-cpp-python;
the converter, a part of llama.cpp's source, also needs gguf and sentencepiece. None of them is a requirement of the
project:

    pip install llama-cpp-python gguf sentencepiece     # builds llama.cpp: a quarter of an hour on one core

The source package of llama-cpp-python holds llama.cpp in its folder vendor/llama.cpp.
"""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

# llama.cpp knows a tokenizer by a hash of what it makes of a text. tiny-qwen's is not in its list; released ones are.
CONVERTER = """
import runpy, sys
sys.path.insert(0, {source!r})
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[0] = {source!r} + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, script: str, *flags: object) -> None:
    command = [sys.executable, str(REPOSITORY / script), *map(str, flags)]
    result = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    for line in result.stdout.splitlines():
        if line.startswith("compared"):
            print(line, flush=True)


def compare_answers(folder: Path, rows: list[dict[str, str]], expected: list[str]) -> int:
    """Ask the GGUF file of a merged checkpoint every row, both ways; returns how many answers differ."""
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    from finetuning.generation.generate import parse_generated, without_answer
    from finetuning.preprocessing.encode import to_messages

    model = Llama(str(folder / "model.gguf"), n_ctx=512, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_tokens": 256, "temperature": 0.0, "repeat_penalty": 1.0}
    differing = 0
    for number, (row, right) in enumerate(zip(rows, expected, strict=True), 1):
        messages = to_messages(without_answer(row), tokenizer)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        completion = model.create_completion(prompt, **options)["choices"][0]["text"]
        chat = model.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]
        for way, text in (("completion", completion), ("chat", chat)):
            _, answer = parse_generated(text, tokenizer)
            if answer != right:
                differing += 1
                print(f"  row {number}, {way}: {answer!r}, not {right!r}")
    return differing


def main() -> None:
    if not find_spec("llama_cpp"):
        print("skipped: llama-cpp-python is not installed")
        return
    source = str(Path(sys.argv[1]).resolve())
    rows = json.loads((REPOSITORY / "data/test.json").read_text(encoding="utf-8"))
    differing = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(source=source), encoding="utf-8")
        for script, flags in (("train_lora.py", []), ("train_prompt_tuning.py", ["--num_virtual_tokens", 20])):
            run(folder, script, "--output_dir", "adapter", "--overwrite_output_dir", True, *flags)
            asked = ["--data_path", REPOSITORY / "data/test.json", "--output_file", f"{script}.jsonl"]
            run(folder, "inference.py", "--adapter_path", "adapter", *asked)
            lines = (folder / f"{script}.jsonl").read_text(encoding="utf-8").splitlines()
            merged = ["--output_dir", script, "--dtype", "float32", "--gguf", True, "--llama_cpp", folder]
            run(folder, "merge_adapter.py", "--adapter_path", "adapter", *merged)
            wrong = compare_answers(folder / script, rows, [json.loads(line)["prediction"] for line in lines])
            print(f"{script}: {2 * len(rows) - wrong} of {2 * len(rows)} answers are equal", flush=True)
            differing += wrong
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
