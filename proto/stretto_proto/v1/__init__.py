"""stretto.v1: the wire protocol."""
