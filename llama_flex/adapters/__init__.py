"""LoRA adapters in PEFT's format: reading and writing them, and switching, training and merging those of a model."""
