"""Meshes and the two ways to run a program on them."""
