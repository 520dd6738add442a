"""One file for each kind of input; each gives back a neutral ``graph.Program``. Nothing is unpickled or evaluated."""
