"""The base model, its fingerprint, soft prompts, and the folder of an adapter."""
