"""Health of the proxy as a whole, and of the Services that have a health check node port."""
