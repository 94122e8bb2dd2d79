"""HTTPS at the endpoint: the profile's certificate, and the proxy that holds it in front of Ray Serve's."""
