"""Use of a Ray cluster: sessions, resources, actors, nodes, and waiting for them."""
