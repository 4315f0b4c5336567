"""Model files, and the parameter trees that they become."""
