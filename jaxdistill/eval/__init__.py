"""Evaluation of what was distilled."""
