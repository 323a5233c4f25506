"""Weights as files: found, fetched, described, converted, calibrated. Beside the flow, before a run.

name or path -> files.find_weights -> a file that client and workers read
published name -> fetching.fetch -> a file in the cache, checked
weights, a volume -> calibrating.calibrate_weights -> the same weights, with norm statistics in the file
"""
