"""WISE (arXiv 2503.07265): 1000 prompts that need knowledge of the world, judged by a VLM."""
