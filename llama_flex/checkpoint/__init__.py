"""Checkpoints: config.json and its rules, safetensors shards, the Hugging Face hub, saving."""
