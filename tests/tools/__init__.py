"""Long checks and measurements that people run by hand; each prints what it does and how long it takes."""
