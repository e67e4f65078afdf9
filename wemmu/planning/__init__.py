"""The cost of a run by arithmetic, without torch and weights, so it is fast on a login node."""
