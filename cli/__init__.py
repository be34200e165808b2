"""The ``tsc`` command: prints what the library returns."""
