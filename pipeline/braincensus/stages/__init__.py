"""One module per stage of a run, in the order of the data flow; `run.py` calls them."""
