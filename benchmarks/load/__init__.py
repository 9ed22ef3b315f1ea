"""Clients of a server, the server that they ask, and what is seen of it meanwhile."""
