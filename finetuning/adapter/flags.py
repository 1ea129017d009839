"""The flags of merge_adapter.py."""

from dataclasses import dataclass

from finetuning.adapter.checkpoint_copy import DTYPES
from finetuning.cli.arguments import TRUST, beside_scripts, flag


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
