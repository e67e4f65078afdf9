"""Everything that knows a foreign model: a folder for each family, with its `adapter.py`; `adapters` chooses it."""
