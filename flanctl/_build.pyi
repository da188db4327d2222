# What `make freeze` writes into the executable; no such module outside of it.
REVISION: str
EPOCH: int
RUST: str
SOURCES: dict[str, str]
PACKAGES: dict[str, str]
