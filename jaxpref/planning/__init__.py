"""What is known of a training step without running it: bytes, operations, and what would make it fit."""
