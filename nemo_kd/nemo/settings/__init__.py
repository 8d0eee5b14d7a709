"""Keys and values of NeMo configurations, checked before NeMo is imported."""
