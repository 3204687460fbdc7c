"""Datasets: where an original may be, how it is read, and what it consists of, to the byte."""
