"""What is measured, a noun per file.

A file has ``settings(scale)``, which lists its rows to be without importing torch's models, and ``measure(setting,
bench)``, which yields the rows of one of them in a process of its own. ``scale`` is ``"full"`` (published shapes on a
GPU) or ``"smoke"`` (the same code, tiny, on the CPU).
"""
