"""A teacher's pass over SFT data: from rows to a store of top-K logits."""
