"""Backbones in the published layout, by their small files and headers alone: no library that loads models, no torch.

`layout` reads files, `check` says what a directory lacks, `identity` which weights it holds.
"""
