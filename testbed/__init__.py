"""What tests and benchmarks both run against: servers to send requests to, and requests that are hard to serve."""
