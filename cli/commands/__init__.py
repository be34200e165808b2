"""One command per file; each has ``command``."""
