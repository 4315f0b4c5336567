"""Rewards, which give a picture a number: step-aware models, latent rewards and the published scorers."""
