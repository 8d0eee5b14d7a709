"""`nemo-kd`: stores on the command line."""
