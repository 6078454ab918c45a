"""The measurements of `fastentropy bench`.

A case is a group of operations that are timed side by side. A record holds the measurements of all cases of a run. It is shown
as tables and as a plot.
"""
