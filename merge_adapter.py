"""Make one plain checkpoint of a base model and its adapter, LoRA or a soft prompt, for any serving engine.

    python merge_adapter.py --adapter_path outputs/lora --output_dir outputs/merged
    python inference.py --model_path outputs/merged --instruction "翻译为英文" --input "早安"

The result is compared with base model and adapter before it gets its name. docs/serving.md says how to serve it.
"""

from dataclasses import dataclass, replace

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from peft import PeftModel

from common import load_model, load_tokenizer
from finetuning.cli.arguments import TRUST, ModelArguments, ScriptParser, beside_scripts, flag
from finetuning.generation.evaluate import load_rows
from finetuning.merging.checkpoint_copy import (
    DTYPES,
    check_not_quantised,
    check_output,
    find_folder,
    give_name,
    result_size,
    stored_dtype,
    unverified_folder,
)
from finetuning.merging.gguf import GGUF, find_converter, write_gguf
from finetuning.merging.merge import check_can_merge, export_adapter, write_merged
from finetuning.merging.served_template import choose_plain_start, write_modelfile
from finetuning.merging.verification import compare, load_served, make_reference
from finetuning.model.base_model import check_model_path
from finetuning.model.folder import load_adapter, read_adapter, use_trained_format
from finetuning.model.hub import create_repository, upload
from finetuning.preprocessing.encode import tokenize


@dataclass
class MergeArguments:
    _argument_group_name = "merging"

    adapter_path: str = flag("outputs/lora", "folder of a saved adapter")
    output_dir: str = flag("outputs/merged", "a new folder for the result")
    model_path: str | None = flag(None, "the base model in 16 or 32 bits; left out: the one that the adapter names")
    dtype: str | None = flag(None, "of the weights; left out: as in the base model", choices=list(DTYPES))
    keep_sampling: bool = flag(False, "the result samples its answers as the base model does; otherwise it is greedy")
    check_data_path: str = flag(beside_scripts("data/test.json"), "rows to compare the result on")
    check_rows: int = flag(8, "how many of these rows, evenly spaced")
    export: str = flag(
        "checkpoint",
        "base model and adapter as one checkpoint, or (peft) the adapter alone, for engines that load adapters",
        choices=["checkpoint", "peft"],
    )
    gguf: bool = flag(False, "write a model.gguf too, and a Modelfile for Ollama; needs --llama_cpp")
    llama_cpp: str | None = flag(None, "folder of llama.cpp's source, which holds its converter")
    push_to_hub: bool = flag(False, "upload the result to the Hugging Face hub")
    hub_model_id: str | None = flag(None, "its name on the hub; left out: that of the folder")
    trust_remote_code: bool = flag(False, TRUST)

    def __post_init__(self) -> None:
        if self.check_rows < 1:
            raise ValueError(f"--check_rows {self.check_rows}: must be at least 1")
        if self.gguf and not self.llama_cpp:
            raise ValueError("--gguf True needs --llama_cpp, the folder of llama.cpp's source")
        if self.gguf and self.export == "peft":
            raise ValueError("--gguf True is for whole checkpoints: leave out --export peft")


def main() -> None:
    (args,) = ScriptParser((MergeArguments,), __doc__).parse()
    converter = find_converter(args.llama_cpp) if args.gguf else None
    adapter, info = read_adapter(args.adapter_path)
    check_can_merge(args.adapter_path, adapter, args.export)
    path = args.model_path or adapter.get("base_model_name_or_path") or ""
    check_model_path(path, "--model_path" if args.model_path else f"the base model of '{args.adapter_path}'")
    folder = find_folder(path)
    check_not_quantised(folder)
    dtype = DTYPES[args.dtype] if args.dtype else stored_dtype(folder)
    check_output(args.output_dir, result_size(folder, dtype) * (2 if args.gguf else 1))
    rows = load_rows(args.check_data_path)
    rows = rows[:: max(1, len(rows) // args.check_rows)][: args.check_rows]
    repository = create_repository(args.hub_model_id, args.output_dir) if args.push_to_hub else None

    base = ModelArguments(path, False, args.trust_remote_code)
    tokenizer = load_tokenizer(base, info.get("prompt_format", "auto"))
    use_trained_format(tokenizer, args.adapter_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computed = dtype if device.type == "cuda" else torch.float32

    def load(model_args: ModelArguments) -> PeftModel:
        return load_adapter(load_model(model_args, computed, device), args.adapter_path, info)

    references = {}
    if info.get("quantization"):  # nothing can be merged into what it was trained on: the difference is told
        references["4-bit base and adapter"] = make_reference(load(replace(base, load_in_4bit=True)), tokenizer, rows)
    model = load(base)
    reference = references["base and adapter"] = make_reference(model, tokenizer, rows)
    start, soft_ids = "", []
    with unverified_folder(args.output_dir) as output:
        if args.export == "peft":
            export_adapter(args.adapter_path, folder, output)
            model, _ = load_served(folder, computed, device, args.trust_remote_code)
            model = PeftModel.from_pretrained(model, output)
        else:
            start = choose_plain_start(tokenizer, reference.questions, reference.answers)
            target = DTYPES[args.dtype] if args.dtype else None
            soft_ids = write_merged(
                model, tokenizer, args.adapter_path, folder, output, start, target, args.keep_sampling
            )
            del model  # two of them may be too many
            model, tokenizer = load_served(output, computed, device, args.trust_remote_code)
    for name, reference in references.items():
        comparison = compare(model, tokenizer, reference, soft_ids, tokenize([start], tokenizer)[0])
        comparison.print(f"compared with {name}")
    if not comparison.is_good(dtype):
        fail(f"the result does not answer as base and adapter do: it keeps the name {output}", 1)
    give_name(output, args.output_dir)
    say(f"saved in {args.output_dir}")
    if converter:
        write_gguf(converter, args.output_dir, dtype, write_modelfile(tokenizer, GGUF, not args.keep_sampling))
    if repository:
        upload(args.output_dir, repository)
    if args.export == "checkpoint":
        say(f"Try it:\npython {beside_scripts('inference.py')} --model_path {args.output_dir} --interactive True")


if __name__ == "__main__":
    main()
