"""Check the keys, values and files of a configuration before anything slow is imported."""
