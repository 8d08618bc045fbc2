"""`megatron-apo compare`: methods of stage 2 beside each other, on one store, the same prompts and seeds.

What is run is in `plan.py`, `campaign.py` runs it, `measured.py` reads what a run has written, `statistics.py` says
what numbers of several seeds are worth, `results.py` puts these together, and `text.py` and `page.py` show them.
"""
