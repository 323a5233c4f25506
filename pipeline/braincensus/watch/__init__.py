"""Watching a run while it is under way: its page on the Dask dashboard, and metrics for Prometheus.

Beside the data flow: nothing here changes a result, and nothing that goes wrong here stops a run.

    run -> tell.Watch (counts, in the client) -> twice a second -> plugin.WatchPlugin (in the scheduler)
                                                                     -> page.py      /braincensus
                                                                     -> metrics.py   /metrics

`state` is what travels: plain numbers, and one byte for each block. It knows no Dask, and no clock but
the times that it is given.
"""

from braincensus.watch.state import RunState

__all__ = ["RunState"]
