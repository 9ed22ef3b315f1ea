"""The engine as the server sees it: in a process of its own, behind a socket."""
