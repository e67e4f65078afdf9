"""DPG-Bench (arXiv 2403.05135): dense prompts, judged by yes-or-no questions that depend on each other."""
