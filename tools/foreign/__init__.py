"""Reads the checkpoints of other frameworks without these frameworks, and without running code in their pickles."""
