"""Flow and diffusion teachers into students of few steps."""
