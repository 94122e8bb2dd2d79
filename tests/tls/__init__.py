"""HTTPS at the endpoint."""
