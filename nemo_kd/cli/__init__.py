"""The `nemo-kd` command line."""
