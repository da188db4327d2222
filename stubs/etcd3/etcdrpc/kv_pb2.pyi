class KeyValue:
    key: bytes
    value: bytes
    mod_revision: int
    lease: int

class Event:
    PUT: int
    DELETE: int
    type: int
    kv: KeyValue
