"""braincensus: every labelled cell of a cleared brain, counted once."""
