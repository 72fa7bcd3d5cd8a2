"""What a run measures and how it is shown: meters, timers, sinks, the live display, plots and the summary.

No module here imports torch. Numbers come in as plain floats under slash-separated names, listed in `catalog`.
"""
