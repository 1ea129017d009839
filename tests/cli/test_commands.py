"""commands.py: the command that resumes a run is the one that ran, but for two flags."""

import pytest

from finetuning.cli.commands import resume_command

BEFORE = ["train_lora.py", "--model_path", "my qwen"]
AFTER = ["--data_path", "x.json"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--overwrite_output_dir"],
        ["--overwrite_output_dir", "True"],
        ["--overwrite_output_dir=True"],
        ["--overwrite-output-dir", "True"],
        ["--resume_from_checkpoint", "out/checkpoint-2"],
        ["--resume-from-checkpoint=out/checkpoint-2", "--overwrite_output_dir", "False"],
    ],
    ids=" ".join,
)
def test_resume_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is true or false takes a value or none, in any of the forms that the parser reads."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    expected = "python train_lora.py --model_path 'my qwen' --data_path x.json --resume_from_checkpoint True"
    for argv in ([*BEFORE, *words, *AFTER], [*BEFORE, *AFTER, *words]):
        monkeypatch.setattr("sys.argv", argv)
        assert resume_command() == expected
