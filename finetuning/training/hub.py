"""Uploading the finished adapter to the Hugging Face hub. The Trainer would upload what has not been checked yet."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from transformers import TrainingArguments

from finetuning.cli.console import fail, first_line, say


def create_repository(args: TrainingArguments) -> None:
    """With --push_to_hub, create the repository before the training, so that a missing login is known then.

    Fills in `args.hub_model_id`.

    Raises:
        SystemExit: code 2, if it cannot be created.
    """
    if not args.push_to_hub or not args.should_save:
        return
    name = args.hub_model_id or Path(args.output_dir).name
    try:
        repository = create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    except Exception as error:  # of the network, the login or the name: several libraries' own
        fail(
            f"--push_to_hub: the repository '{name}' cannot be created: {first_line(error)}\n"
            f"Log in with: hf auth login; or leave the flag out, and later: hf upload {name} {args.output_dir}"
        )
    args.hub_model_id = repository.repo_id


def upload_adapter(args: TrainingArguments) -> None:
    """With --push_to_hub, upload the output folder without its checkpoints.

    Raises:
        SystemExit: code 1, if it cannot be uploaded.
    """
    if not args.push_to_hub or not args.should_save:
        return
    try:
        upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            token=args.hub_token,
            ignore_patterns=["checkpoint-*"],
            commit_message="Upload adapter",
        )
    except Exception as error:
        fail(
            f"the adapter is saved in {args.output_dir}, but cannot be uploaded: {first_line(error)}\n"
            f"Upload it later: hf upload {args.hub_model_id} {args.output_dir}",
            1,
        )
    say(f"uploaded to {args.hub_model_id}")
