"""One module per family of input formats; `volume.py` chooses between them."""
