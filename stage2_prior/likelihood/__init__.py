"""How many bits the codes cost under a prior."""
