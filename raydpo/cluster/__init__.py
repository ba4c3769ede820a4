"""Ray from the outside: sessions, resources, actors, nodes, waiting."""
