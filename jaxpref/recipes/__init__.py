"""What recipes are made of: sections of fields, and the facts of methods."""
