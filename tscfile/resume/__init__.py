"""Taking a snapshot back into an engine: loading, proving that it fits, continuing from it."""
