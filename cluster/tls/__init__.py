"""HTTPS: a certificate, and the proxy that holds it in front of what Ray serves in plain, endpoint or dashboard."""
