"""What a set of adapter weights is: kinds, files, fit, slots and versions. Knows no server and no HTTP."""
