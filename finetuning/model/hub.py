"""Uploading a finished adapter or a merged checkpoint to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from finetuning.cli.console import fail, first_line, say


def create_repository(name: str | None, folder: str, token: str | None = None, private: bool | None = None) -> str:
    """Create a repository before the work begins, so that a missing login is known then; returns its full name.

    It is called as the folder that will be uploaded if `name` is None.
    """
    name = name or Path(folder).name
    try:
        return create_repo(name, token=token, private=private, exist_ok=True).repo_id
    except Exception as error:  # of the network, the login or the name: several libraries' own
        fail(
            f"--push_to_hub: the repository '{name}' cannot be created: {first_line(error)}\n"
            f"Log in with: hf auth login; or leave the flag out, and later: hf upload {name} {folder}"
        )


def upload(folder: str, repository: str, token: str | None = None) -> None:
    """Upload a folder without its checkpoints."""
    try:
        upload_folder(repo_id=repository, folder_path=folder, token=token, ignore_patterns=["checkpoint-*"])
    except Exception as error:
        fail(
            f"{folder} is whole, but cannot be uploaded: {first_line(error)}\n"
            f"Upload it later: hf upload {repository} {folder}",
            1,
        )
    say(f"uploaded to {repository}")
