"""Books: what is learnt once for a model and shared by all its files."""
