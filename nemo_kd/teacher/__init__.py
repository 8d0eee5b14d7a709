"""The teacher's one pass over the SFT data: from rows to a store of top-K logits."""
