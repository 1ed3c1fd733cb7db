"""`moeinf.pack`: writes a checkpoint whose experts lie one after another, quantised where asked.

targets.py has the formats that it can write and quantised.py one expert in them; shards.py has the
place of every tensor and plan.py the whole pack; making.py makes the bytes and writer.py writes
them; pack.py says what comes first and what comes next. Serves nothing: a pack is an ordinary
checkpoint.
"""
