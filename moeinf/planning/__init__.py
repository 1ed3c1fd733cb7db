"""`moeinf plan`: how fast a model will run here, at which budget and in which format.

rates.py measures this machine, model.py reads what a token needs, and estimate.py puts the two
together. Nothing is loaded but the built-in model, which is timed.
"""
