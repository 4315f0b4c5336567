"""Drawing pictures, judging and comparing them, and the pages and tables that show it."""
