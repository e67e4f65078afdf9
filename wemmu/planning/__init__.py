"""What a run will cost, by arithmetic: no torch, no weights, so it answers at once on a login node."""
