"""Everything under the commands, in folders named after the steps of a run."""
