"""What is trained and saved: the adapter folder, the fingerprint of its base model, soft prompts."""
