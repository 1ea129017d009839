"""Weights sharded over processes: FSDP2 on CPUs equals one process; what accelerate makes of the configurations.

DeepSpeed is not among the packages of the tests; docs/scaling.md says what was run with it.
"""

import json
import os
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch as launcher
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from ranks import FSDP
from support import FLAT, HYBRID, REPOSITORY, Run, difference, launch, logged, make_model
from torch.distributed.fsdp import MixedPrecisionPolicy

import train_lora
import train_prompt_tuning
from common import load_model
from finetuning.cli.arguments import ModelArguments
from finetuning.distributed import adjust_fsdp
from finetuning.model.base_model import quantization_options
from finetuning.training.checkpoints import find_broken_part

CONFIGS = REPOSITORY / "configs"
RUNS = {
    "lora": (train_lora, "--lora_dropout 0 --gradient_accumulation_steps 2"),
    "prompt": (train_prompt_tuning, "--learning_rate 0.01"),
    "prompt_4bit": (train_prompt_tuning, "--learning_rate 0.01 --load_in_4bit True"),
}


@pytest.fixture(scope="module")
def words(base_path: str, rows_path: str) -> list[str]:
    flags = f"--model_path {base_path} --data_path {rows_path} --num_train_epochs 2 --logging_steps 1 --save_steps 2"
    return f"{flags} --keep_checkpoints True --save_total_limit 9 --disable_tqdm True".split()


@pytest.fixture(scope="module")
def sharded(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the runs of two processes under accelerate's FSDP2, and what was printed."""
    folder = tmp_path_factory.mktemp("sharded")
    commands = [["fully_shard"]]
    for name, (script, flags) in RUNS.items():
        command = ["fsdp", script.__name__, *words, *flags.split(), "--per_device_train_batch_size", "2"]
        commands.append([*command, "--output_dir", folder / name])
        if "4bit" not in name:
            resume = ["--resume_from_checkpoint", folder / name / "checkpoint-4"]
            commands.append([*command, *resume, "--output_dir", folder / f"{name}-resumed"])
    return folder, launch(*commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_fsdp_equals_one_process(
    run_main: Run, sharded: tuple[Path, str], words: list[str], tmp_path: Path, name: str
) -> None:
    """The saved adapter is gathered, with the names of one process."""
    script, flags = RUNS[name]
    run_main(script, *words, *flags.split(), "--per_device_train_batch_size", 4, "--output_dir", tmp_path)
    assert logged(sharded[0] / name) == pytest.approx(logged(tmp_path), abs=1e-5)
    assert difference(sharded[0] / name, tmp_path) < 1e-5
    for checkpoint in (sharded[0] / name).glob("checkpoint-*"):
        assert find_broken_part(checkpoint) is None
        (checkpoint / "optimizer_0/.metadata").unlink()
        assert find_broken_part(checkpoint) == "optimizer_0/.metadata is missing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_fsdp_resumes(sharded: tuple[Path, str], name: str) -> None:
    assert difference(sharded[0] / name, sharded[0] / f"{name}-resumed") == 0


@pytest.mark.slow
def test_torchs_own_fully_shard(sharded: tuple[Path, str]) -> None:
    """Half-precision base weights and a float32 adapter lie in one unit; nothing is cast but by autocast."""
    reports = [json.loads(line.split(" ", 1)[1]) for line in sharded[1].splitlines() if line.startswith("fully_shard")]
    assert len(reports) == 4
    for report in reports:
        assert report["loss"] < 1e-5
        assert report["gradient"] < (1e-5 if report["dtype"] == "torch.float32" else 0.02)


# ---- configurations


def variables(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` sets for the processes, in a machine with two GPUs."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "train_lora.py"]
    args = launcher.launch_command_parser().parse_args(words)
    with patch("torch.cuda.is_available", lambda: True), patch("torch.cuda.device_count", lambda: 2):
        args = launcher._validate_launch_command(args)[0]  # private, for want of a public way
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def test_ddp_asks_for_no_engine() -> None:
    found = variables("ddp")
    assert not any(name.startswith(("FSDP_VERSION", "ACCELERATE_USE")) for name in found)
    assert load_config_from_file(str(CONFIGS / "ddp.yaml")).distributed_type == DistributedType.MULTI_GPU


def test_fsdp_is_what_the_tests_run() -> None:
    found = variables("fsdp")
    assert FSDP == {name: found[name] for name in FSDP}
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in found


@pytest.mark.parametrize("model_type", [*FLAT, *HYBRID])
def test_fsdp_finds_the_layers_of_every_family(model_type: str) -> None:
    model = get_peft_model(make_model(model_type), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with patch.dict(os.environ, FSDP):
        plugin = FullyShardedDataParallelPlugin()
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    layers = model.get_base_model().get_decoder().layers
    adjust_fsdp(plugin, layers)
    assert plugin.fsdp_version == 2 and plugin.mixed_precision_policy == MixedPrecisionPolicy()
    plugin.set_auto_wrap_policy(model)
    found = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {type(layer) for layer in layers} == found


def test_full_state_dicts_are_not_saved() -> None:
    """They would gather the full base model in one process, and the prompt of a soft prompt in a process alone."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    adjust_fsdp(plugin, [])
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not hasattr(plugin.state_dict_config, "rank0_only")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage: int) -> None:
    found = variables(f"deepspeed_zero{stage}")
    expected = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": str(stage == 3).lower(),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
    }
    assert expected == {name: found[name] for name in expected}


# ---- loading


@pytest.mark.parametrize(("sharded", "storage"), [(False, torch.uint8), (True, torch.bfloat16)])
def test_4bit_storage(sharded: bool, storage: torch.dtype) -> None:
    """FSDP shards only floating-point numbers."""
    options = quantization_options(make_model().config, True, torch.bfloat16, sharded)
    assert options["quantization_config"].bnb_4bit_quant_storage == storage


def test_4bit_share_counts_bytes(base_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    shares = []
    for sharded in (False, True):
        arguments = ModelArguments(model_path=base_path, load_in_4bit=True)
        load_model(arguments, torch.float32, torch.device("cpu"), sharded)
        shares.append(capsys.readouterr().out)
    assert "4-bit weights: " in shares[0] and shares[0] == shares[1]


@pytest.mark.parametrize(
    ("sharded", "load_in_4bit", "place"), [(False, False, "cuda:1"), (True, False, None), (True, True, "cuda:1")]
)
def test_where_the_weights_go(base_path: str, sharded: bool, load_in_4bit: bool, place: str | None) -> None:
    """Each process has a GPU of its own; what is to be sharded goes to main memory first."""
    arguments = ModelArguments(model_path=base_path, load_in_4bit=load_in_4bit)
    stop = Mock(side_effect=ValueError("seen"))
    with patch("common.AutoModelForCausalLM.from_pretrained", stop), pytest.raises(SystemExit):
        load_model(arguments, torch.float16, torch.device("cuda:1"), sharded)
    device_map = stop.call_args.kwargs["device_map"]
    assert device_map == (place and {"": torch.device(place)})
