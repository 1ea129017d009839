"""What the user types and reads: arguments and messages."""
