"""Checks of a configuration before anything slow is imported: keys, values, files."""
