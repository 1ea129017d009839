"""Make one plain checkpoint of a base model and its adapter, LoRA or a soft prompt, for any serving engine.

    python merge_adapter.py --adapter_path outputs/lora --output_dir outputs/merged
    python inference.py --model_path outputs/merged --instruction "翻译为英文" --input "早安"

The result is compared with base model and adapter before it gets its name. docs/serving.md says how to serve it.
"""

from dataclasses import dataclass
from pathlib import Path

from finetuning.cli.console import fail, say  # before peft, whose import is noisy

# isort: split
import torch
from peft import PeftModel

from common import load_model, load_tokenizer
from finetuning.cli.arguments import TRUST, ModelArguments, ScriptParser, beside_scripts, flag
from finetuning.generation.evaluate import load_rows
from finetuning.merging.checkpoint_copy import Checkpoint, check_output, give_name, unverified_folder
from finetuning.merging.merge import check_can_merge, export_adapter, write_merged
from finetuning.merging.serving import choose_plain_start, find_converter, make_modelfile, write_gguf
from finetuning.merging.verification import answer_alone, compare, load_served
from finetuning.model.base_model import check_model_path
from finetuning.model.folder import find_adapter, load_adapter, read_adapter
from finetuning.model.hub import create_repository, upload
from finetuning.preprocessing.encode import tokenize
from finetuning.preprocessing.flags import FORMATS


@dataclass
class MergeArguments:
    _argument_group_name = "merging"

    adapter_path: str = flag("outputs/lora", "folder of a saved adapter")
    output_dir: str = flag("outputs/merged", "a new folder for the result")
    model_path: str | None = flag(None, "the base model in 16 or 32 bits; left out: the one that the adapter names")
    dtype: str | None = flag(
        None, "of the weights; left out: as in the base model", choices=["float32", "float16", "bfloat16"]
    )
    prompt_format: str | None = flag(
        None, "chat, plain or auto, as in training; left out: as the adapter was trained", choices=list(FORMATS)
    )
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
        if self.gguf and not self.llama_cpp:
            raise ValueError("--gguf True needs --llama_cpp, the folder of llama.cpp's source")
        if self.gguf and self.export == "peft":
            raise ValueError("--gguf True is for whole checkpoints: leave out --export peft")


def main() -> None:
    (args,) = ScriptParser((MergeArguments,), __doc__).parse()
    args.output_dir = str(Path(args.output_dir))  # without a slash at its end
    converter = find_converter(args.llama_cpp) if args.gguf else None
    args.adapter_path = find_adapter(args.adapter_path)
    config, info = read_adapter(args.adapter_path)
    check_can_merge(args.adapter_path, config, args.export)
    path = args.model_path or config.get("base_model_name_or_path")
    if not path:
        fail(f"'{args.adapter_path}' does not say which base model it was trained on: name it with --model_path")
    check_model_path(path, "--model_path" if args.model_path else f"the base model of '{args.adapter_path}'")
    base = Checkpoint(path)
    base.check_not_quantised()
    new_dtype = getattr(torch, args.dtype) if args.dtype else None
    dtype = new_dtype or base.dtype
    check_output(args.output_dir, base.size_in(dtype) * (2 if args.gguf else 1))
    rows = load_rows(args.check_data_path)
    rows = rows[:: max(1, len(rows) // args.check_rows)][: args.check_rows]
    repository = create_repository(args.hub_model_id, args.output_dir) if args.push_to_hub else None

    tokenizer = load_tokenizer(
        ModelArguments(path, False, args.trust_remote_code), args.prompt_format, args.adapter_path
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computed = dtype if device.type == "cuda" else torch.float32

    def load(in_4bit: bool) -> PeftModel:
        base_model = load_model(ModelArguments(path, in_4bit, args.trust_remote_code), computed, device)
        return load_adapter(base_model, args.adapter_path, info)

    # nothing can be merged into 4-bit weights: how far the result is from what was trained on them is only printed
    trained = answer_alone(load(in_4bit=True), tokenizer, rows) if info.get("quantization") else None
    model = load(in_4bit=False)
    expected = answer_alone(model, tokenizer, rows)
    plain_start, soft_ids = "", []
    with unverified_folder(args.output_dir) as output:
        if args.export == "peft":
            export_adapter(args.adapter_path, base, output)
            model, _ = load_served(base.folder, computed, device, args.trust_remote_code)
            model = PeftModel.from_pretrained(model, output)
        else:
            plain_start = choose_plain_start(
                tokenizer, [row.question for row in expected], [row.answer for row in expected]
            )
            soft_ids = write_merged(
                model, tokenizer, args.adapter_path, base, output, plain_start, new_dtype, args.keep_sampling
            )
            del model  # two of them may be too many
            model, tokenizer = load_served(output, computed, device, args.trust_remote_code)
    start_ids = tokenize([plain_start], tokenizer)[0]
    if trained:
        compare(model, tokenizer, trained, soft_ids, start_ids).print("compared with 4-bit base and adapter")
    comparison = compare(model, tokenizer, expected, soft_ids, start_ids)
    comparison.print("compared with base and adapter")
    if not comparison.is_good(dtype):
        coarse = comparison.loses_adapter() and dtype != torch.float32
        advice = f";\n{str(dtype)[6:]} rounds away what this adapter changes: try --dtype float32" if coarse else ""
        fail(f"the result does not answer as base and adapter do: it keeps the name {output}{advice}", 1)
    give_name(output, args.output_dir)
    say(f"saved in {args.output_dir}")

    if converter:
        write_gguf(converter, args.output_dir, dtype, make_modelfile(tokenizer, greedy=not args.keep_sampling))
    if repository:
        upload(args.output_dir, repository)
    if args.export == "checkpoint":
        say(f"Try it:\npython {beside_scripts('inference.py')} --model_path {args.output_dir} --interactive True")


if __name__ == "__main__":
    main()
