# What `make freeze` writes into the executable; no such module outside of it.
MAGIC: bytes
CODE: dict[str, bytes]
UNITS: dict[str, str]
