"""Long tests: programs that `make test-long` runs one by one; each writes results of `benchmarks.reliability`."""
