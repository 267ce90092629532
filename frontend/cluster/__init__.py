"""Replicas of a server behind routers that know what each has cached, on Ray Serve."""
