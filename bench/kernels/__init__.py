"""Times the kernels of `specvlm_kernels`: see `python -m bench.kernels --help`."""
