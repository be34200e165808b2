"""Codecs of others, a page each, to be measured beside our own. See `registry`."""
