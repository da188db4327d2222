"""flanctl: flannel for people who run their own hosts."""

__version__ = "0.1.0"
