"""One module per stage of a run, in the order of the data flow; `census.py` calls them."""
