"""flanctl: flannel for people who run their own hosts."""

__version__ = "0.1.0"


def version_line() -> str:
    """What `flanctl version` prints."""
    return f"flanctl {__version__}"
