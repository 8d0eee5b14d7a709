"""What a NeMo configuration may hold: keys and values, checked before NeMo is imported."""
