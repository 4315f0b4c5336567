"""The devices and processes of a run: mesh and shardings, starting several processes, what a chip can do."""
