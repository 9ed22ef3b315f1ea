"""Replicas of one server on the machines of a Ray cluster (Ray Serve): `python -m dpn_rt.serve_ray`."""
