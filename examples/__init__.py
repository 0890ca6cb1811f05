"""Short scripts that show what the library does; tests and benchmarks import some of them."""
