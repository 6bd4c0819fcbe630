"""Experiments about the system: ablations, the cost of a leak, benchmarks, and their committed results."""
