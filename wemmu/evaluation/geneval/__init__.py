"""GenEval (arXiv 2310.11513): whether the prompt's objects appear with its numbers, colours and positions."""
