"""What a training step needs, without running it: bytes, operations, and what would make it fit."""
