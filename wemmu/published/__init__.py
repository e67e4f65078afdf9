"""Reads backbones in the published layout by their small files and headers: without model libraries or torch.

`layout` reads files, `check` names missing files, `identity` computes which weights a directory holds.
"""
