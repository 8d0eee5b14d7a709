"""Stores, JSONL and checkpoints that were made to hurt whoever opens them."""
