"""What is optimised: one file a method, from (weights, batch, key) to sums."""
