"""Where images may come from: data in the request, hosts and files that the operator has named."""
