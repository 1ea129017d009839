"""Everything under the commands, in rooms named after the steps of a run."""
