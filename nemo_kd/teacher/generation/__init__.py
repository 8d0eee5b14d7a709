"""Generation of answers by the teacher, stored with its top-K logits."""
