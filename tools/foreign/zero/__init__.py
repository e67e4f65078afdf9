"""Reads DeepSpeed's folders without DeepSpeed, on any machine, and without running code in their pickles."""
