"""What gives a picture a number: step-aware models and the published scorers."""
