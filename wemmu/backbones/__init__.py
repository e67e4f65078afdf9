"""Adapters for models of transformers and diffusers: one folder per family; `adapters` chooses one."""
