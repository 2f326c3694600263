"""Files the library writes and reads: the distilled artefact, metrics and checkpoints."""
