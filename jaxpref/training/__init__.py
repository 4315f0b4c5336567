"""The training loop and what it needs: building a config's parts, the step, checkpoints, and monitoring."""
