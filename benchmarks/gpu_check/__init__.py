"""What a GPU has to say, in a given number of minutes: `python -m benchmarks.gpu_check --minutes 9 --out DIR`."""
