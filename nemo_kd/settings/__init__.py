"""What a configuration may hold, checked before anything slow is imported: keys, values, files."""
