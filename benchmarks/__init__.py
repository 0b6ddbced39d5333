"""The benchmark suite: cases, peers, a runner with a process for each row, and reports made from the rows.

    python -m benchmarks --list
    python -m benchmarks --case forward --peer vramkit,diffusers --out benchmarks/results/suite.json
    python -m benchmarks.report benchmarks/results/suite.json
    pytest benchmarks --benchmark-json host.json        # what runs on a CPU in minutes

A new case is a file in `cases/`, a new library to compare with one in `peers/`. No part of the installed package.
"""
