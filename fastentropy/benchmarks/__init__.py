"""The measurements of `fastentropy bench`: cases, their measurements, and a record with its tables and plot."""
