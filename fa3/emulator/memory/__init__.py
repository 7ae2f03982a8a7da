"""Memory as a kernel sees it: registered host ranges, shared memory, barriers in it, bulk copies."""
