"""Loads the images of requests: from data in the request, and from hosts and files that the operator allows."""
