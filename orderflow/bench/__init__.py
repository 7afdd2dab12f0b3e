"""The benchmarks: what is measured, against which reference, by which load; the torture shares servers and load."""
