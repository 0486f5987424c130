"""Sums that nobody can take apart: the ring they live in, and secure aggregation by masking."""
