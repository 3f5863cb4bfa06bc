"""The command line: the only place that builds a real store, controller and server."""
