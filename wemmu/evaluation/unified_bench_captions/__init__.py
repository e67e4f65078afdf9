"""Unified-Bench of UAE (arXiv 2509.09666), protocol 2: whose captions a VLM prefers."""
