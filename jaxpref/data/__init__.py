"""Data: the embedded emoji, preference data of every kind, and Grain pipelines."""
