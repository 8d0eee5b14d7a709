"""The student: NeMo's SFT model with a distillation loss on stored teacher logits."""
