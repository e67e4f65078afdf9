"""Reconstruction and edit fidelity on held-out records of the user's own data, without a judge."""
