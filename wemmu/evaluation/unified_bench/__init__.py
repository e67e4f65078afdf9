"""Unified-Bench of UAE (arXiv 2509.09666): how much of an image survives its own caption."""
