"""Draws, judges and compares pictures, and writes the pages and tables that show them."""
