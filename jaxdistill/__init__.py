"""Distillation at accelerator speed: data sets, flow teachers and vision-language models."""

__version__ = "0.1.0"
