"""What a run would take, before anything is launched: `raydpo plan`."""
