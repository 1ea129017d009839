"""Base model and adapter as one checkpoint that any engine serves, and the proof that it answers the same."""
