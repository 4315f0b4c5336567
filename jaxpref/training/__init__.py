"""The training loop and what it needs: from a config to a state, its checkpoints, and what is watched on the way."""
