"""The operations in plain NumPy and Python, for reading and for holding the other twins to."""
