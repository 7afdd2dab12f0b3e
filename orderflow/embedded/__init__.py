"""Real servers on one machine without Docker: PostgreSQL and a broker, for `dev`, tests and benchmarks."""
