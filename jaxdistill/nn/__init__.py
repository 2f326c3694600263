"""Networks: the only modules of the package that import `flax.linen`."""
