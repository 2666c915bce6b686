"""Federated LoRA fine-tuning of language models, simulated on many GPUs."""

__version__ = "0.1.0"
