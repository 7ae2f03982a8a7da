"""Memory as a kernel sees it: host ranges, shared memory, mbarriers, asynchronous copies."""
