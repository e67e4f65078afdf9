"""GenEval (arXiv 2310.11513): do the objects that a prompt names appear, as many, so coloured and so placed?"""
