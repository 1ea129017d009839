"""What records runs, `--report_to`: through the callbacks of transformers, checked before anything is loaded."""

import os
from importlib import import_module
from importlib.util import find_spec

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from finetuning.cli.console import fail, first_line, is_main_process

# What to import and what to install, where they are not called as the flag has it.
PACKAGES = {"azure_ml": ("azureml", "azureml-mlflow"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit",) * 2}
# Trackers that may need a key or a server, and how to do without.
REMEDIES = {
    "mlflow": "To record on this machine: MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
    "swanlab": "To log in: swanlab login; to record on this machine: SWANLAB_MODE=offline",
    "wandb": "To log in: wandb login; to record on this machine: WANDB_MODE=offline",
}
OFFLINE_MODES = ("offline", "local", "disabled")


def check_trackers(names: list[str], hub_token: str | None) -> None:
    """Refuse a tracker that does not exist or lacks its package, and a token in a command line that is recorded."""
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            fail(f"--report_to {error}")
        module, package = PACKAGES.get(name, (name, name))
        if name != "kubeflow" and not find_spec(module):  # kubeflow needs none, and is used if its server is there
            fail(f"--report_to {name} needs the package {package}: pip install {package}, or leave the flag out")
    if names and hub_token:
        fail("--hub_token would be recorded with the command line: set the variable HF_TOKEN, or log in: hf auth login")


def reach_trackers(names: list[str]) -> None:
    """Log in, or open the store. The callbacks would do it after the model is loaded, and fail with a traceback."""
    for name in names:
        if name not in REMEDIES or os.environ.get(f"{name.upper()}_MODE") in OFFLINE_MODES or not is_main_process():
            continue
        module = import_module(name)
        try:
            module.search_experiments(max_results=1) if name == "mlflow" else module.login()
        except Exception as error:  # each tracker has its own
            fail(f"--report_to {name}: {first_line(error)}\n{REMEDIES[name]}")


def start_swanlab(args: TrainingArguments) -> None:
    """Start SwanLab's run. transformers 5.23 asks first whether there is one, which is an error from SwanLab 0.8 on."""
    if "swanlab" not in args.report_to or not is_main_process():
        return
    names = {"project": "SWANLAB_PROJECT", "id": "SWANLAB_RUN_ID", "resume": "SWANLAB_RESUME"}
    options = {name: os.environ.get(variable) for name, variable in names.items()}
    options["resume"] = options["resume"] or ("allow" if args.resume_from_checkpoint else None)
    import_module("swanlab").init(experiment_name=args.run_name, **options)
