"""Measurements, side by side in one run: `make bench`. Ratios are the result; absolute figures are the machine's."""
