"""Times whole decoding, in full size: see `python -m bench.decode --help`."""
