# The built-in module of the frozen executable: packaging/executable/src/main.rs.
parts: dict[str, tuple[int, int]]
"""What stands behind the program in its file: name → offset, length (bytes)."""
closed: list[str]
"""Which of stdin, stdout and stderr the parent had closed."""

def damage() -> str | None: ...
def memfd_create(name: str, flags: int, /) -> int: ...
