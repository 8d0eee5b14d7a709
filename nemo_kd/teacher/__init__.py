"""Run a teacher over SFT data and write its top-K logits to a store."""
