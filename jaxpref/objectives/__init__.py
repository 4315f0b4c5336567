"""The methods: one file each, from (weights, batch, key) to sums."""
