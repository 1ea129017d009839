"""From prompts to answers, and how good they are."""
