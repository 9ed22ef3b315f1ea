"""The engine as the server sees it: a process that is reached over a socket."""
