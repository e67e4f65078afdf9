"""Exact scores of a saved checkpoint on held-out requests, and the report of a run."""
