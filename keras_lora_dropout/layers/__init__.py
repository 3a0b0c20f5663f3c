"""Layers with LoRA Dropout adapters."""
