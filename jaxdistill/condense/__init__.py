"""Data-set distillation: many images into a few."""
