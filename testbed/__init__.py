"""What tests and benchmarks share: servers to send requests to, requests that are hard to serve, processes to watch."""
