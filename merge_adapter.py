"""Make one plain checkpoint of a base model and its adapter, LoRA or a soft prompt, for any serving engine.

    python merge_adapter.py --adapter_path outputs/lora --output_dir outputs/merged
    python inference.py --model_path outputs/merged --instruction "翻译为英文" --input "早安"

The result is compared with base model and adapter before it gets its name. docs/serving.md says how to serve it.
"""

from dataclasses import replace

import torch
from peft import PeftModel

from common import load_model, load_tokenizer
from finetuning.adapter.base_model import check_model_path
from finetuning.adapter.checkpoint_copy import (
    DTYPES,
    check_not_quantised,
    check_output,
    find_folder,
    give_name,
    result_size,
    stored_dtype,
    unverified_folder,
)
from finetuning.adapter.flags import MergeArguments
from finetuning.adapter.folder import load_adapter, read_adapter, use_trained_format
from finetuning.adapter.gguf import GGUF, find_converter, write_gguf
from finetuning.adapter.hub import create_repository, upload
from finetuning.adapter.merging import check_can_merge, export_adapter, write_merged
from finetuning.adapter.served_template import choose_plain_start, write_modelfile
from finetuning.cli.arguments import ModelArguments, ScriptParser, beside_scripts
from finetuning.cli.console import fail, say
from finetuning.generation.evaluate import load_rows
from finetuning.generation.verification import compare, load_served, make_reference
from finetuning.preprocessing.encode import tokenize


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
