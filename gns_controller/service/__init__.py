"""The controller: what happens to a measurement, an operator command or a query, without HTTP."""
