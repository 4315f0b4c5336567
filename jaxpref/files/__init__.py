"""Model files, and the parameter trees they become."""
