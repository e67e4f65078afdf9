"""Unified-Bench of UAE (arXiv 2509.09666): similarity of images and their reconstructions from captions."""
