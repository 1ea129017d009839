"""What benchmark.py measures with: meters, model shapes, the table."""
