"""ImgEdit-Bench (arXiv 2505.20275): single-turn edits of nine types, judged by a VLM with the published prompts."""
