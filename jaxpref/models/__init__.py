"""The networks of Stable Diffusion in Flax Linen, and the small networks that judge pictures."""
