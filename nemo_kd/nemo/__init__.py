"""NeMo 1's Hydra-configured SFT with a distillation loss: every module that imports NeMo."""
