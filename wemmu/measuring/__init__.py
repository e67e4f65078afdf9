"""Measures the cost of a model on its real classes without weights."""
