"""The likelihood of codes under a prior, in bits."""
