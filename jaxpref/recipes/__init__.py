"""What recipes are made of: sections of fields, and what is asked of methods."""
