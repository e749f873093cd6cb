"""HTTP for everything the proxy serves itself: health, service health checks, metrics."""
