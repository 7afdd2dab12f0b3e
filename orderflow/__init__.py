"""orderflow: orders in, payments out, nothing lost, nothing twice."""

__version__ = "0.1.0"
