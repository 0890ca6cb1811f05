"""The paper's claims on real photographs: a module for each block of runs, and the page of their records."""
