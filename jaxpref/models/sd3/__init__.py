"""Stable Diffusion 3 and 3.5: its transformer, its conditioning and its published sizes."""
