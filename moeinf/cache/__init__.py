"""What is resident: the cache, its leases, budgets, devices and observers."""
